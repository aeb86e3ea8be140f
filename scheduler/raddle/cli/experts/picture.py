"""Load per die as a picture of characters: a row a node, a bar a die."""

from __future__ import annotations

import numpy as np

from raddle.core.experts.layout import FloatArray
from raddle.model.expert_map import DieState, MapDocument

_BARS = "▁▂▃▄▅▆▇█"


def load_picture(document: MapDocument, carried: FloatArray) -> str:
    """A row for each node: every die's load over all layers, and its worst layer in figures.

    Args:
        carried: [layers, dies]
    """
    live = np.array([die.state is DieState.LIVE and not die.shared for die in document.dies])
    mean = carried[:, live].mean(axis=1, keepdims=True)
    relative = np.divide(carried, mean, out=np.zeros_like(carried), where=mean > 0)
    average, worst = relative.mean(axis=0), relative.max(axis=0)
    top = max(float(average[live].max(initial=0.0)), 1e-12)
    rows: dict[int, list[int]] = {}
    for number, die in enumerate(document.dies):
        rows.setdefault(die.node, []).append(number)
    lines = [f"load per die, mean of all layers: {_BARS[-1]} = {top:.2f} of the mean die"]
    for node, dies in sorted(rows.items()):
        bars = "".join(_bar(document, die, float(average[die]) / top) for die in dies)
        mine = [die for die in dies if live[die]]
        said = (
            f"{average[mine].min():.2f} to {average[mine].max():.2f}, worst layer"
            f" {worst[mine].max():.2f}"
            if mine
            else "holds nothing"
        )
        lines.append(f"node {node:3d}  {bars}  {said}")
    if not live.all():
        lines.append("x lost, d drained, s shared expert alone")
    return "\n".join(lines)


def _bar(document: MapDocument, number: int, height: float) -> str:
    die = document.dies[number]
    if die.state is DieState.LOST:
        return "x"
    if die.state is DieState.DRAINED:
        return "d"
    if die.shared:
        return "s"
    return _BARS[min(int(height * len(_BARS)), len(_BARS) - 1)]
