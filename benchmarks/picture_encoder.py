# SPDX-License-Identifier: Apache-2.0
"""Does a trained encoder know things that it never saw, and things in a style that it never saw?

    python benchmarks/picture_encoder.py --pictures=DIR --workdir=DIR [--config.x=y ...]

The encoder stage of configs/demo_llm.py is trained in the workdir, or read if it is finished there.
Then each picture of the test split is judged by the mean over its patches: its subcategory and
category by the classifier of patches, its name by the likeness to the names of all things that the
test split shows. DIR is the folder that `vlm-jax data fetch pictures` prints.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import facts  # noqa: E402

BATCH = 64
TOP = 5  # names among which the right one is looked for


def trained(flags: list[str], workdir: Path):
    """The recipe, the encoder with its heads, the training inputs and the test split."""
    from vlm_jax.data import sources
    from vlm_jax.training import stages
    from vlm_jax.training.recipe import Recipe
    from vlm_jax.training.workdir import claim
    from vlm_jax.verbs import configuration

    config = configuration.read(flags).config
    with claim(workdir, config) as claimed:
        recipe = Recipe.of(config)
        inputs, begin = stages.open_inputs(claimed, recipe)
        reader = stages.pretrain_reader(recipe, workdir, inputs, begin=begin)
    return recipe, reader, inputs, sources.open_source(recipe.origin, "test")


def judged(recipe, reader, inputs, test) -> dict[str, dict[str, float]]:
    """Family -> its numbers: patches and pictures, and the shares of them that are right."""
    import jax
    import numpy as np

    from vlm_jax.data.benchmark import picture_scenes
    from vlm_jax.training import contrast

    side, things = recipe.model.vit.side, test.things
    first = test.patch_classes - len(things.subcategories)  # class of the first subcategory
    category = {t.subcategory: t.category for t in things.things}
    of_class = np.array([category[kind] for kind in things.subcategories])
    bags = contrast.bags(test.names, contrast.vocabulary(inputs.source.names))
    heads = jax.jit(lambda m, x: (m.patches.head(levels := m.vit(x)), m.likeness(levels, bags)))
    scenes = [spec for spec in inputs.source.specs if isinstance(spec, picture_scenes.Scene)]
    shown = collections.Counter(p.thing for spec in scenes for p in spec.pictures)
    kinds, categories, names = (collections.Counter() for _ in range(3))
    for k, times in shown.items():
        thing = things.things[k]
        kinds[thing.subcategory] += times
        categories[thing.category] += times
        names[thing.name] += times
    usual = [counter.most_common(1)[0][0] for counter in (kinds, categories, names)]

    family = {test[k].image: test[k].family for k in range(len(test))}
    found = collections.defaultdict(list)
    hits = collections.defaultdict(list)
    count = len(test.images)
    for start in range(0, count, BATCH):
        some = [min(start + k, count - 1) for k in range(BATCH)]  # all batches have one size
        pixels = np.stack([inputs.processor.pixels(test.images[i]) for i in some])
        classes, near = map(np.asarray, heads(reader, pixels))
        for k, i in enumerate(some[: count - start]):
            labels = test.patch_labels(i, side)
            hits[family[i]] += (classes[k].argmax(1) == labels)[labels > 0].tolist()
            numbers = test.patch_names(i, side)
            for number in sorted(set(numbers) - {0}):
                mine = numbers == number
                (label,) = set(labels[mine])
                scores = classes[k, mine][:, first:]
                share = np.exp(scores - scores.max(1, keepdims=True))
                share = (share / share.sum(1, keepdims=True)).mean(0)
                kind, name = things.subcategories[label - first], near[k, mine].mean(0)
                by_category = {c: share[of_class == c].sum() for c in set(of_class)}
                rank = int((name > name[number - 1]).sum())
                said = " ".join(test.names[number - 1])
                found[family[i]].append(
                    dict(
                        subcategory=things.subcategories[share.argmax()] == kind,
                        subcategory_majority=kind == usual[0],
                        category=max(by_category, key=by_category.get) == category[kind],
                        category_majority=category[kind] == usual[1],
                        name=rank == 0,
                        **{f"name_top_{TOP}": rank < TOP},
                        name_majority=said.startswith(usual[2]),
                    )
                )
    shares = {name: dict(patches=len(right), patch=round(float(np.mean(right)), 4))
              for name, right in hits.items()}  # fmt: skip
    for name, rows in found.items():
        shares[name] |= dict(pictures=len(rows)) | {
            key: round(float(np.mean([j[key] for j in rows])), 4) for key in rows[0]
        }
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", required=True, help="the folder of the packages")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--out", help="default: benchmarks/results/DATE-picture-encoder.json")
    options, more = parser.parse_known_args()
    facts.use_threads(2)
    import jax

    from vlm_jax import mesh

    home = Path(__file__).parent.parent
    flags = [f"--config={home}/configs/demo_llm.py", f"--config.data.pictures={options.pictures}"]
    results = facts.of_run(__doc__.splitlines()[0], threads=2, packages=("jax", "flax"))
    with jax.set_mesh(mesh.make()):
        recipe, reader, inputs, test = trained(flags + more, options.workdir)
        results["flags"] = more
        results["encoder"] = vars(recipe.encoder)
        results["names"] = dict(train=len(inputs.source.names), test=len(test.names))
        results["families"] = judged(recipe, reader, inputs, test)
    print(json.dumps(results["families"], indent=1))
    print(facts.write(results, "picture-encoder", options.out))


if __name__ == "__main__":
    main()
