"""Pictures of schedules, and the command that draws them."""

import re

import pytest
import typer
from schedules.tokens import BUILT_IN
from typer.testing import CliRunner

from shardtrain.cli.schedule import schedule as command
from shardtrain.errors import UserError
from shardtrain.pipeline.schedules import Costs, draw, make, published_order, to_csv


def test_in_the_terminal():
    assert draw.terminal(draw.Chart.of(make("1f1b", 2, 3)), 80).plain == (
        "1f1b: time 12, bubble 25.0%, peak in flight 3 1\n"
        "rank 0  F0F1····F2B0──··B1──B2──\n"
        "rank 1  ··F0B0──F1B1──F2B2──····\n"
        "F forward, B backward, · idle\n"
    )
    assert draw.terminal(draw.Chart.of(published_order("zb_v", 1, 1, 2)), 80).plain == (
        "zb_v, as published, 2 chunks: time 3, bubble 0.0%, peak in flight 2\n"
        "rank 0  F0aF0bI0bW0bI0aW0a\n"
        "F forward, I input gradient, W weight gradient, a to b chunks, · idle\n"
    )


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("width", [30, 57, 200])
def test_in_a_terminal_of_any_width_every_action_is_drawn_once(name, width):
    chart = draw.Chart.of(make(name, 3, 12, 2))
    lines = draw.terminal(chart, width).plain.splitlines()
    rows = [
        line.removeprefix(f"rank {rank}  ") for rank in range(3) for line in lines if line.startswith(f"rank {rank}")
    ]
    assert all(len(row) + 8 <= width for row in rows)
    cells = re.findall(r"[FBIW]\d+[ab]", "".join(rows))
    assert len(cells) == len(chart.simulation.spans) == 3 * 12 * 2 * len(chart.pipeline.phases)


def test_uneven_costs_are_drawn_too():
    for costs in (Costs(F=1, I=1.3, W=0.4), Costs(W=0), Costs(message=0.3)):
        chart = draw.Chart.of(make("zb_h1", 3, 4), costs)
        assert f"bubble {chart.simulation.bubble_fraction:.1%}" in draw.terminal(chart, 100).plain
        draw.picture([chart])


def test_a_picture_holds_every_action_and_its_numbers(tmp_path):
    charts = [draw.Chart.of(make("1f1b", 4, 8)), draw.Chart.of(published_order("zb_h1", 4, 8))]
    figure = draw.picture(charts)
    for axes, chart in zip(figure.axes, charts, strict=True):
        assert len(axes.patches) == len(chart.simulation.spans) + 4  # and a row of idle time for each rank
        texts = [text.get_text() for text in axes.texts]
        assert [text for text in texts if text == "7"] == ["7"] * (8 if chart is charts[0] else 12) + ["7"] * (
            chart is charts[0]  # rank 0 of 1f1b also has 7 in flight
        )
        assert f"bubble {chart.simulation.bubble_fraction:.1%}" in axes.get_title(loc="right")
    assert draw.save(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert draw.save(figure, tmp_path / "a.svg").read_bytes() == draw.save(figure, tmp_path / "b.svg").read_bytes()
    with pytest.raises(UserError, match=r"has the suffix '.jpg'; use one of .svg, .png, .pdf"):
        draw.save(figure, tmp_path / "a.jpg")
    with pytest.raises(UserError, match="there is no folder"):
        draw.save(figure, tmp_path / "none" / "a.png")


def run(*arguments):
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_command_draws_one(tmp_path):
    out = run("1f1b", "--ranks", 4, "--microbatches", 8, "--out", tmp_path / "one.svg")
    assert "1f1b: time 33, bubble 27.3%, peak in flight 7 5 3 1" in out
    assert "<svg" in (tmp_path / "one.svg").read_text()
    assert "interleaved, 3 chunks" in run("1f1b", "--chunks", 3)
    assert "zb_v, 2 chunks: " in run("zb_v")
    assert "zb_v, as published, 2 chunks: time 25.5, bubble 5.9%" in run("zb_v", "--published")


def test_the_command_compares_all(tmp_path):
    out = run("--compare", "--published", "--chunks", 2, "--out", tmp_path / "all.png")
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert ["1f1b", "1", "14", "33", "27.3%", "7", "7 5 3 1"] in rows
    assert ["1f1b (published)", "1", "33", "27.3%", "4", "4 3 2 1"] in rows
    assert ["interleaved", "2", "26", "28.5", "15.8%", "5.5", "11 9 7 5"] in rows
    assert "interleaved" in run("--compare", "--chunks", 3), "although zb_v has 2 chunks and never 3"
    assert {row[0] for row in rows} >= {*BUILT_IN, *(f"{name} (published)" for name in BUILT_IN)}
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_the_command_takes_a_file(tmp_path):
    to_csv(make("zb_v", 2, 3, 2), tmp_path / "mine.csv")
    assert "mine, 2 chunks: " in run(tmp_path / "mine.csv", "--ranks", 2, "--microbatches", 3)
    assert "mine" in run(tmp_path / "mine.csv", "--ranks", 2, "--microbatches", 3, "--compare")


def test_the_command_explains_what_is_wrong():
    with pytest.raises(UserError, match=r"name a schedule \(gpipe, .*or say --compare"):
        run()
    with pytest.raises(UserError, match="did you mean interleaved"):
        run("interleave")
    with pytest.raises(UserError, match="zb_v has chunks 3"):
        run("zb_v", "--chunks", 3)
