"""An oracle: run a table with tokens for values."""

import itertools

BUILT_IN = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")


def runs(schedule):
    """Whether a table computes all gradients, by passing tokens as a device would: no arithmetic on ticks."""
    last = schedule.stages - 1
    there = {("x", 0, m) for m in range(schedule.microbatches)}
    done, mail = [], []
    for row in schedule.table:
        there.update(mail)
        mail = []
        for phase, items in zip(schedule.phases, row.T, strict=True):
            for rank, item in enumerate(items.tolist()):
                if item < 0:
                    continue
                chunk, m = divmod(item, schedule.microbatches)
                stage = schedule.placement.index((rank, chunk))
                need = {"F": {("x", stage, m)}, "W": {("I", stage, m)}}.get(phase, {("F", stage, m), ("g", stage, m)})
                if not need <= there:
                    return False
                there.add((phase, stage, m))
                done.append((phase, stage, m))
                if phase == "F":
                    if stage == last:
                        there.add(("g", stage, m))
                    else:
                        mail.append(("x", stage + 1, m))
                elif phase != "W":
                    mail.append(("g", stage - 1, m))
    wanted = itertools.product(schedule.phases, range(last + 1), range(schedule.microbatches))
    return sorted(done) == sorted(wanted)
