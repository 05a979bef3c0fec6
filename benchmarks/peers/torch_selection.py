# SPDX-License-Identifier: Apache-2.0
"""Selections of patches in PyTorch, one image at a time, step by step as their papers tell them.

Written from the same description as ours (docs/selection.md), not copied from the releases: like
those, each next patch is one round of operations called from Python. A selection gives the chosen
patches in ascending order; VisionZip gives its tokens.
"""

import torch


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length one."""
    return x / x.norm(dim=-1, keepdim=True)


def divprune(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Each next patch is the one whose nearest chosen patch is farthest."""
    rows = unit(tokens)
    apart = 1 - rows @ rows.T
    scores = apart.topk(2, dim=0, largest=False).values[1]
    chosen = [int(scores.argmax())]
    for _ in range(count - 1):
        scores = apart[torch.tensor(chosen)].min(dim=0).values
        scores[chosen] = -torch.inf
        chosen.append(int(scores.argmax()))
    return torch.tensor(chosen).sort().values


def cdpruner(
    tokens: torch.Tensor, images: torch.Tensor, texts: torch.Tensor, count: int
) -> torch.Tensor:
    """Greedy steps of a determinantal point process, weighted by how unlike the text a patch is."""
    unlike = -(unit(images) @ unit(texts).T).mean(dim=1)
    weight = (unlike - unlike.min() + 1e-6) / (unlike.max() - unlike.min())
    rows = unit(tokens)
    kernel = weight[:, None] * (rows @ rows.T) * weight
    factors = torch.zeros(count, len(tokens))
    left = kernel.diagonal().clone()
    chosen = []
    for i in range(count):
        best = int(left.argmax())
        chosen.append(best)
        explained = torch.einsum("i,in->n", factors[:i, best], factors[:i])
        factors[i] = (kernel[best] - explained) / left[best].sqrt()
        left = left - factors[i] ** 2
        left[best] = -torch.inf
    return torch.tensor(chosen).sort().values


def mmtok(
    tokens: torch.Tensor, features: torch.Tensor, words: torch.Tensor, count: int
) -> torch.Tensor:
    """Each next patch is the one that adds most to what is covered of words and patches."""
    rows = unit(tokens)
    asked = (unit(words) @ rows.T / 0.02).softmax(dim=-1) / len(words)
    seen = (unit(features) @ unit(features).T / 0.2).softmax(dim=-1) / len(features)
    covers = torch.cat([asked, 0.5 * seen])
    covered = torch.zeros(len(covers))
    free = torch.ones(len(tokens), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        gain = (covers - covered[:, None]).clamp(min=0).sum(dim=0)
        best = int(gain.masked_fill(~free, -torch.inf).argmax())
        chosen.append(best)
        free[best] = False
        covered = torch.maximum(covered, covers[:, best])
    return torch.tensor(chosen).sort().values


def vispruner(
    features: torch.Tensor, attention: torch.Tensor, count: int, ratio: float = 0.5
) -> torch.Tensor:
    """The patches of most attention, and what rounds of dropping similar ones leave of the rest."""
    order = attention.argsort(descending=True, stable=True)
    important, live = order[: int(count * ratio)], order[int(count * ratio) :]
    diverse = count - len(important)
    while len(live) > diverse:
        even, odd = live[0::2], live[1::2]
        dropped = min(8, len(live) - diverse, len(even))
        most = (unit(features[even]) @ unit(features[odd]).T).max(dim=1).values
        even = even[most.argsort(descending=True, stable=True)]
        live = torch.cat([even[dropped:], odd])
    return torch.cat([important, live]).sort().values


def visionzip(
    features: torch.Tensor,
    keys: torch.Tensor,
    attention: torch.Tensor,
    dominant: int,
    contextual: int,
) -> torch.Tensor:
    """The rows of most attention, the class token first, and sums of the others."""
    chosen = torch.zeros(len(features), dtype=torch.bool)
    chosen[0] = True
    chosen[attention.topk(dominant - 1).indices + 1] = True
    rest, metric = features[~chosen], unit(keys[~chosen])
    is_target = torch.zeros(len(rest), dtype=torch.bool)
    is_target[torch.arange(contextual) * max(1, len(rest) // contextual)] = True
    nearest = (metric[~is_target] @ metric[is_target].T).argmax(dim=1)
    joins = torch.nn.functional.one_hot(nearest, contextual).float()
    means = joins.T @ rest[~is_target] / joins.sum(dim=0).clamp(min=1)[:, None]
    return torch.cat([features[chosen], rest[is_target] + means])
