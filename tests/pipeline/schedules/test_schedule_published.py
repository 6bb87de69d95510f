"""Orders as printed in the papers, and the papers' formulas for time and memory."""

import itertools

import pytest

from shardtrain.pipeline.schedules import Costs, make, published_order, simulate

COSTS = [Costs(), Costs(W=2.0), Costs(F=1.0, I=1.5, W=0.5), Costs(F=2.0, I=3.0, W=1.0)]
SIZES = [(1, 3), (2, 5), (3, 9), (4, 8), (4, 33), (8, 16)]


def orders(name, ranks, microbatches, chunks=1):
    """Such as `F0 F1 B0`; with several chunks `F0a F0b`."""
    return [
        " ".join(f"{phase}{m}{'abcd'[chunk] * (chunks > 1)}" for phase, chunk, m in order)
        for order in published_order(name, ranks, microbatches, chunks).orders
    ]


def test_1f1b_as_in_figure_4_of_megatron():
    """Narayanan et al. 2021 (arXiv:2104.04473), figure 4, top; microbatches from 0."""
    assert orders("1f1b", 4, 8) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_interleaved_as_in_figure_4_of_megatron():
    """The same figure, bottom: first and last device."""
    first, *_, last = orders("interleaved", 4, 8, 2)
    assert first == (
        "F0a F1a F2a F3a F0b F1b F2b F3b F4a F5a F6a B0b F7a B1b F4b B2b F5b B3b F6b B0a F7b B1a "
        "B2a B3a B4b B5b B6b B7b B4a B5a B6a B7a"
    )
    assert last == (
        "F0a F1a F2a F3a F0b B0b F1b B1b F2b B2b F3b B3b F4a B0a F5a B1a F6a B2a F7a B3a F4b B4b F5b B5b F6b B6b "
        "F7b B7b B4a B5a B6a B7a"
    )


def test_gpipe_starts_the_backward_with_the_last_microbatch():
    assert orders("gpipe", 2, 3) == ["F0 F1 F2 B2 B1 B0"] * 2


def test_zb_h1_of_four_ranks():
    """By hand from Qi et al. 2023 (arXiv:2401.10241), figure 3, top: 1F1B, but rank r keeps r W waiting."""
    assert orders("zb_h1", 4, 8) == [
        "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7",
        "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 F6 I4 W3 F7 I5 W4 I6 W5 I7 W6 W7",
        "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 F6 I5 W3 F7 I6 W4 I7 W5 W6 W7",
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7",
    ]


def test_zb_v_of_two_ranks():
    """By hand from the rule of the paper's section 6: down, up, and a backward as soon as there is one."""
    assert orders("zb_v", 2, 4, 2) == [
        "F0a F1a F2a F0b I0b W0b F1b I1b W1b F3a I0a W0a F2b I2b W2b I1a W1a F3b I3b W3b I2a W2a I3a W3a",
        "F0a F0b F1a F1b I0b W0b F2a I0a W0a F2b I1b W1b F3a I1a W1a F3b I2b W2b I2a I3b I3a W2a W3b W3a",
    ]


def bubble(pipeline, costs):
    """Time beyond the work of one rank."""
    result = simulate(pipeline, costs)
    assert result.busy == pytest.approx([(costs.F + costs.B) * pipeline.microbatches] * pipeline.ranks)
    assert result.bubble == pytest.approx([result.makespan - busy for busy in result.busy])
    return result.bubble[0]


def both(name, p, m, v=1):
    return make(name, p, m, v), published_order(name, p, m, v)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(("p", "m"), SIZES)
class TestBubbles:
    """p ranks, m >= p microbatches, v chunks; times of a microbatch through all chunks of a rank."""

    def test_gpipe_and_1f1b(self, p, m, costs):
        for name in ("gpipe", "1f1b"):
            for form in both(name, p, m):
                assert bubble(form, costs) == pytest.approx((p - 1) * (costs.F + costs.B))

    @pytest.mark.parametrize("v", [2, 3, 4])
    def test_breadth_first_and_interleaved(self, p, m, costs, v):
        for name in ("gpipe", "interleaved"):
            for form in both(name, p, m, v):
                if name == "gpipe" or isinstance(form, type(make("1f1b", 1, 1))) or m % p == 0:
                    assert bubble(form, costs) == pytest.approx((p - 1) * (costs.F + costs.B) / v)

    def test_zb_h1(self, p, m, costs):
        aligned, published = both("zb_h1", p, m)
        assert bubble(aligned, costs) == pytest.approx((p - 1) * (costs.F + costs.I))
        # The paper's formula has W; its order can hide no more of W than F leaves room for.
        assert bubble(published, costs) == pytest.approx((p - 1) * (costs.F + costs.I - min(costs.F, costs.W)))
        for v in (2, 3, 4):
            assert bubble(make("zb_h1", p, m, v), costs) == pytest.approx((p - 1) * (costs.F + costs.I) / v)

    def test_zb_v(self, p, m, costs):
        aligned, published = both("zb_v", p, m, 2)
        assert bubble(aligned, costs) == pytest.approx((p - 1) * (costs.F + costs.I))
        if costs.F == costs.I == costs.W and m >= 2 * p - 1:
            # No rank waits once it has begun; what remains is that rank r begins r forwards of a chunk late.
            assert simulate(published, costs).stalls == pytest.approx([0] * p)
            assert bubble(published, costs) == pytest.approx((p - 1) * costs.F / 2)

    def test_skipping_idle_ranks_changes_no_aligned_time(self, p, m, costs):
        for name, v in (("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2)):
            schedule = make(name, p, m, v)
            assert simulate(schedule, costs, "skip").makespan == pytest.approx(simulate(schedule, costs).makespan)


@pytest.mark.parametrize(("p", "m"), SIZES)
class TestMemory:
    """Peak activations of each rank, in those of one microbatch through one chunk."""

    def test_gpipe(self, p, m):
        for v in (1, 2, 3):
            for form in both("gpipe", p, m, v):
                assert simulate(form).peak_activations == (m * v,) * p

    def test_1f1b(self, p, m):
        aligned, published = both("1f1b", p, m)
        assert simulate(published).peak_activations == tuple(min(p - r, m) for r in range(p))
        assert simulate(aligned).peak_activations == tuple(min(2 * (p - 1 - r) + 1, m) for r in range(p))

    @pytest.mark.parametrize("v", [2, 3, 4])
    def test_interleaved(self, p, m, v):
        if m % p == 0:  # what the paper asks for
            expected = tuple(min(p * v + p - 1 - 2 * r, m * v) for r in range(p))
            for form in both("interleaved", p, m, v):
                assert simulate(form).peak_activations == expected

    @pytest.mark.parametrize("waiting", [0.0, 0.5, 1.0])
    def test_zb_h1(self, p, m, waiting):
        aligned, published = both("zb_h1", p, m)
        result = simulate(published, Costs(waiting=waiting))
        assert result.peak_activations == pytest.approx([(p - r) + r * waiting for r in range(p)])
        # Aligned, as much waits for W as published, and the rest is as in the aligned 1F1B.
        if m >= 2 * p - 1:
            expected = [2 * (p - 1 - r) + 1 + r * waiting for r in range(p)]
            assert simulate(aligned, Costs(waiting=waiting)).peak_activations == pytest.approx(expected)

    def test_zb_v(self, p, m):
        aligned, published = both("zb_v", p, m, 2)
        if m >= 2 * p - 1:
            assert simulate(published).peak_activations == (2 * p,) * p
            assert simulate(aligned, Costs(waiting=0)).peak_activations == (2 * p,) * p
            assert simulate(aligned).peak_activations == (3 * p - 1,) * p

    def test_inputs_are_kept_as_long_as_activations_where_messages_are_used_at_once(self, p, m):
        for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_v", 2)):
            result = simulate(make(name, p, m, v), Costs(waiting=0))
            if name != "interleaved" or m % p == 0:
                assert result.saved_inputs == result.peak_activations


def test_times_of_a_published_order_counted_manually():
    """Two ranks, two microbatches, F 1, B 2, messages 0.5. Rank 0: F0 0-1, F1 1-2; rank 1: F0 1.5-2.5, B0 -4.5, ..."""
    result = simulate(published_order("1f1b", 2, 2), Costs(message=0.5))
    times = {(span.rank, span.action.phase, span.action.microbatch): (span.start, span.stop) for span in result.spans}
    assert times == {
        (0, "F", 0): (0, 1),
        (0, "F", 1): (1, 2),
        (1, "F", 0): (1.5, 2.5),
        (1, "B", 0): (2.5, 4.5),
        (1, "F", 1): (4.5, 5.5),
        (0, "B", 0): (5, 7),
        (1, "B", 1): (5.5, 7.5),
        (0, "B", 1): (8, 10),
    }
    assert (result.makespan, result.bubble, result.bubble_fraction) == (10, (4, 4), pytest.approx(0.4))


def test_times_in_lockstep_by_hand():
    """The same in four ticks, each but the first begun by messages: F; F and B; F and B; B."""
    result = simulate(make("1f1b", 2, 2), Costs(message=0.5))
    assert result.makespan == 1 + (0.5 + 1 + 2) + (0.5 + 1 + 2) + (0.5 + 2)
    skip = simulate(make("1f1b", 2, 2), Costs(message=0.5), "skip")
    assert skip.makespan == result.makespan


def test_an_unaligned_table_loses_where_phases_differ_and_reaches_the_published_time_where_not():
    """One action per tick: a tick costs its slowest action, if idle ranks skip; all phases, if they do not."""
    order = published_order("zb_h1", 4, 16)
    table = order.lockstep()
    assert simulate(table, idle="skip").makespan == simulate(order).makespan
    assert simulate(table).makespan > 2 * simulate(order).makespan
    slow = Costs(F=1, I=2, W=1)
    assert simulate(table, slow, "skip").makespan > simulate(make("zb_h1", 4, 16), slow).makespan


def test_fewer_microbatches_than_ranks_cost_what_one_trip_does():
    for name, p in itertools.product(("gpipe", "1f1b"), (3, 8)):
        assert simulate(make(name, p, 2)).makespan == (2 + p - 1) * 3
    # Several chunks: a microbatch passes every stage, and the second follows one tick behind.
    assert simulate(make("interleaved", 4, 2, 2)).makespan == (2 * 4 + 2 - 1) * 3 / 2
