"""The pictures and tables of docs/explain/sharding.md, from the rules table: python docs/site/sharding.py"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jax.sharding import AbstractMesh, AxisType

from shardtrain import MeshSpec, ModelDef, Partitioner, load_config, sharding_report
from shardtrain.sharding import count_shards
from shardtrain.sharding.mesh import AXES
from shardtrain.sharding.rules import DEFAULT_RULES
from shardtrain.weights.paths import flatten
from shardtrain.weights.weight import Weight

ROOT = Path(__file__).parent.parent.parent
PAGE, PICTURE = ROOT / "docs/explain/sharding.md", ROOT / "docs/pictures/sharding.svg"
MESHES = ({"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"tensor": 8})
#: The weights that are drawn, by the ends of their paths, and what they are called.
DRAWN = {
    "embedding.weight": "embedding",
    "attention.query.weight": "query",
    "attention.out.weight": "attention out",
    "mlp.up.weight": "mlp up",
    "mlp.down.weight": "mlp down",
    "mlp_norm.scale": "norm",
}
SHOWN_DEVICE = 5
BLUE, PALE, LINE = "#3b6fd4", "#eef3fd", "#8ca3cc"


def partitioner(sizes: dict[str, int]) -> Partitioner:
    """The default rules over a mesh without devices."""
    spec = MeshSpec(**sizes)
    return Partitioner(AbstractMesh(tuple(spec.sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def named(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def model(config: str) -> ModelDef:
    """The model of a config, as shapes."""
    section = load_config(ROOT / "configs" / config, check_files=False).model
    return ModelDef(lambda rngs: section.load()(**section.arguments(), rngs=rngs))


def rules_table() -> str:
    """The rules table in Markdown."""
    rows = [f"| `{name}` | {', '.join(f'`{a}`' for a in axes) or 'none'} |" for name, axes in DEFAULT_RULES.items()]
    return "\n".join(["| logical axis | split over |", "|---|---|", *rows])


def bytes_table() -> str:
    """What one device of eight holds of a large model, in Markdown."""
    weights = model("llama_1b.yaml").weights
    lines = [
        "| mesh | weights | gradients | AdamW's state | together | share |",
        "|---|---|---|---|---|---|",
    ]
    for sizes in ({"data": 1}, *MESHES):
        report = sharding_report(weights, partitioner(sizes))
        held = report.device_bytes
        cells = [f"{held * times / 2**30:.2f} GiB" for times in (1, 1, 2, 4)]
        name = "one device" if sizes == {"data": 1} else named(sizes)
        lines.append(f"| {name} | {' | '.join(cells)} | {held / report.total_bytes:.1%} |")
    return "\n".join(lines)


def drawn() -> list[tuple[str, Weight]]:
    """The weights that are drawn, and their names."""
    found = flatten(model("llama_1b.yaml").weights)
    return [(name, next(w for path, w in found.items() if path.endswith(end))) for end, name in DRAWN.items()]


def picture() -> str:
    """Each weight on each mesh, cut along the lines of its shards, with the share of one device filled."""
    left, top, width, height = 150, 62, 172, 100
    weights = drawn()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width * len(MESHES)} '
        f'{top + height * len(weights) + 30}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for column, sizes in enumerate(MESHES):
        parts.append(text(left + width * (column + 0.5), 34, named(sizes), bold=True, anchor="middle"))
    for row, (name, weight) in enumerate(weights):
        shape, axes = weight.shape[weight.stack :], weight.axes[weight.stack :]
        y = top + height * row
        parts += [text(16, y + 34, name, bold=True), text(16, y + 52, ", ".join(map(str, axes)), "#666", 11)]
        parts.append(text(16, y + 68, " x ".join(map(str, shape)), "#666", 11))
        for column, sizes in enumerate(MESHES):
            parts += cell(weight, sizes, left + width * column, y, width, height)
    foot = (
        f"Filled: the share of device {SHOWN_DEVICE} of 8, and its bytes (float32, one layer of configs/llama_1b.yaml)."
    )
    parts += [text(16, top + height * len(weights) + 14, foot, "#666", 12), "</svg>", ""]
    return "\n".join(parts)


def cell(weight: Weight, sizes: dict[str, int], x: float, y: float, width: float, height: float) -> Iterator[str]:
    """A weight on a mesh: its first dim down, the others across."""
    place = partitioner(sizes)
    axes, shape = weight.axes[weight.stack :], weight.shape[weight.stack :]
    spec = place.spec(*axes)
    parts = [*spec, *[None] * (len(shape) - len(spec))]
    index = dict(zip(sizes, coordinates(SHOWN_DEVICE, list(sizes.values())), strict=True))
    cuts = [(count_shards(place.mesh, part), share(part, index, sizes)) for part in parts]
    (down, at_y), *rest = cuts if len(cuts) > 1 else [(1, 0), *cuts]
    across, at_x = max(rest)  # at most one of the other dims is cut
    w, h = (110, 62) if len(shape) > 1 else (110, 14)
    x, y = x + (width - w) / 2, y + (70 - h) / 2
    yield f'<rect x="{x:g}" y="{y:g}" width="{w}" height="{h}" fill="{PALE}" stroke="{LINE}"/>'
    yield (
        f'<rect x="{x + w / across * at_x:g}" y="{y + h / down * at_y:g}" width="{w / across:g}" '
        f'height="{h / down:g}" fill="{BLUE}"/>'
    )
    for i in range(1, down):
        yield f'<path d="M{x:g} {y + h / down * i:g} h{w}" stroke="{LINE}"/>'
    for i in range(1, across):
        yield f'<path d="M{x + w / across * i:g} {y:g} v{h}" stroke="{LINE}"/>'
    layers = weight.shape[0] if weight.stack else 1
    held = weight.nbytes // layers // (down * across)
    yield text(x + w / 2, y + h + 15, size_of(held), "#444", 11, anchor="middle")


def size_of(count: int) -> str:
    """Bytes in a fitting unit."""
    return f"{count / 2**20:g} MiB" if count >= 2**18 else f"{count / 2**10:g} KiB"


def coordinates(device: int, sizes: list[int]) -> list[int]:
    """Where a device is on each axis; the last one is the fastest."""
    found = []
    for size in reversed(sizes):
        device, at = divmod(device, size)
        found.append(at)
    return found[::-1]


def share(part: str | tuple[str, ...] | None, index: dict[str, int], sizes: dict[str, int]) -> int:
    """Which shard of a dim a device holds."""
    at = 0
    for axis in (part,) if isinstance(part, str) else part or ():
        at = at * sizes[axis] + index[axis]
    return at


def text(
    x: float, y: float, words: str, fill: str = "#222", size: int = 13, *, bold: bool = False, anchor: str = "start"
):
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size}" text-anchor="{anchor}"{weight}>{words}</text>'


def page(old: str) -> str:
    """The page with its tables made anew."""
    for name, table in (("rules", rules_table()), ("bytes", bytes_table())):
        pattern = re.compile(rf"(<!-- {name}: [^\n]*\n\n).*?(\n\n<!-- end -->)", re.S)
        old = pattern.sub(lambda found, table=table: found[1] + table + found[2], old)
    return old


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    PICTURE.write_text(picture())
