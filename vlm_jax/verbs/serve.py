# SPDX-License-Identifier: Apache-2.0
"""Serves a checkpoint by OpenAI's chat API, with a number of visual tokens for every request.

    vlm-jax serve --checkpoint=DIR
    vlm-jax serve --checkpoint=DIR --law=law.json --chip=v5e --target-ms=200 --efficiency=0.5
    vlm-jax serve --checkpoint=DIR --host=0.0.0.0 --api-key-file=keys.txt

POST /v1/chat/completions answers any OpenAI client; a page to try it is at /. A request says how
many visual tokens an image gets (`visual_tokens`, `mm_processor_kwargs.max_soft_tokens`,
`image_url.detail`) or leaves it to the law ("auto"). GET /v1/models says what may be asked for,
/health how the server is, /metrics what it has done. docs/serving.md has the whole contract.

SIGTERM: no new requests, those that were taken are answered, exit status 42. Needs the extra
`serve`: pip install 'vlm_jax[serve]'.
"""

import argparse
from pathlib import Path
from typing import Any

from vlm_jax import progress
from vlm_jax.cost import calibration, chips
from vlm_jax.planning import parsing
from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser

GB = 10**9


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a model folder, a finished training, or a grid's cell",
    )
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="0.0.0.0 for every network")
    add("--port", type=int, metavar="N", default=8000, help="0 chooses a free one")
    add("--model-name", metavar="NAME", help="as clients ask for it (default: the folder's name)")
    add(
        "--mesh",
        metavar="AXIS=N",
        help="devices that split the weights of each layer, such as tensor=4 (default: one device)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number format of weights and activations (default: as stored)",
    )
    add("--no-warmup", action="store_true", help="listen at once, and compile for first requests")
    group = parser.add_argument_group("how many requests, and for how long").add_argument
    group("--slots", type=int, metavar="N", default=8, help="requests that are answered together")
    group("--queue", type=int, metavar="N", default=64, help="requests that wait; then status 429")
    group("--deadline", type=float, metavar="SECONDS", default=300.0, help="of a whole answer")
    group("--drain", type=float, metavar="SECONDS", default=60.0, help="for answers after SIGTERM")
    group(
        "--index-gb",
        type=float,
        metavar="GB",
        default=1.0,
        help="memory for images that were encoded, in 1e9 bytes; 0 keeps none",
    )
    budget = parser.add_argument_group("visual tokens of an image").add_argument
    budget(
        "--visual-tokens",
        type=int,
        metavar="V",
        help="of a request that does not say (default: as trained)",
    )
    budget("--low", type=int, metavar="V", help="of detail=low (default: the fewest)")
    budget("--high", type=int, metavar="V", help="of detail=high (default: the most)")
    budget(
        "--law",
        metavar="FILE",
        help="law.json of vlm-jax fit, by which auto takes V (default: none)",
    )
    budget("--mix", metavar="SHARES", help="weights over the law's families (default: its own)")
    budget(
        "--target-ms",
        type=float,
        metavar="MS",
        help="milliseconds to the end of an answer, for auto; needs --law and --chip (default: "
        "none)",
    )
    budget(
        "--chip",
        metavar="CHIP",
        help=f"{', '.join(chips.CHIPS)}, or cpu (measured now): times for auto (default: none)",
    )
    budget("--chips", type=int, metavar="N", default=1, help="chips that work on it together")
    budget("--efficiency", metavar="SHARE", help="reached fraction of the roofline (default: 1)")
    budget(
        "--calibration",
        choices=tuple(calibration.NAMED),
        help="a measured system: efficiency and overheads (default: the roofline)",
    )
    safety = parser.add_argument_group("who may ask, and what").add_argument
    safety("--api-key-file", metavar="FILE", help="one key a line (default: everybody is answered)")
    safety(
        "--allow-image-hosts",
        metavar="LIST",
        help="hosts from which pictures are fetched, by https (default: none)",
    )
    safety("--most-images", type=int, metavar="N", default=16, help="of a request")
    safety("--most-mb", type=float, metavar="MB", default=32, help="of a request, in 2**20 bytes")
    safety(
        "--most-megapixels", type=float, metavar="N", default=40, help="of an image, in 1e6 pixels"
    )


def run(options: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    try:
        from vlm_jax.server import run as server
    except ModuleNotFoundError as missing:
        raise ValueError(f"{missing.name} is missing: pip install 'vlm_jax[serve]'") from None
    from vlm_jax.server.app import application
    from vlm_jax.server.options import Keys

    cli.say_warnings()  # and a line for each answer, by the same way
    keys = Keys.of_file(options.api_key_file) if options.api_key_file else Keys()
    bound = server.listen(options.host, options.port)  # before minutes of loading
    service = service_of(options)
    if not options.no_warmup:
        with progress.doing("compiling"):
            service.engine.warm()
    app = application(service, keys=keys, page=page_of(service, with_key=bool(keys.hashes)))
    if options.host not in ("127.0.0.1", "::1", "localhost") and not keys.hashes:
        progress.say("warning: whoever reaches this address is answered: --api-key-file=FILE")
    server.until_stopped(service, app, bound, drain=options.drain)
    return 0


def service_of(options: argparse.Namespace) -> Any:
    """The service of a command line: its model, engine, budgets and limits."""
    from vlm_jax import compiled
    from vlm_jax.planning import question
    from vlm_jax.server.auto import Auto
    from vlm_jax.server.budget import Chooser
    from vlm_jax.server.choices import Choices
    from vlm_jax.server.options import MB, Limits
    from vlm_jax.server.remote import Web, check_hosts
    from vlm_jax.server.service import Service
    from vlm_jax.serving.engine import Engine
    from vlm_jax.serving.model import VLM
    from vlm_jax.training import runs

    check(options)
    limits = Limits(
        body_bytes=round(options.most_mb * MB),
        images=options.most_images,
        pixels=round(options.most_megapixels * 1e6),
        deadline_seconds=options.deadline,
        requests=options.slots + options.queue,
    )
    hosts = check_hosts(options.allow_image_hosts.split(",")) if options.allow_image_hosts else ()
    reached = question.reached(options.calibration, parsing.efficiency(options.efficiency))
    if options.mix is not None and options.law is None:
        raise ValueError("--mix needs --law, whose families it weighs")
    if options.chip is None and (reached is not None or options.chips != 1):
        raise ValueError("--efficiency, --calibration and --chips need --chip")
    compiled.keep()
    with progress.doing("loading the model"):
        stored = runs.read(options.checkpoint, "--checkpoint")
        size = stored.size()
        choices = Choices.of(
            size, default=options.visual_tokens, low=options.low, high=options.high
        )
        chip = question.chip_of(options.chip, None)
        auto = Auto(
            size,
            parsing.read_laws(options.law, options.mix) if options.law else None,
            None if chip is None else chip.times(options.chips),
            options.target_ms,
            reached or calibration.IDEAL,
        )
        model = VLM.of(stored, dtype=options.dtype, mesh=mesh_of(options.mesh))
    engine = Engine(
        model,
        slots=options.slots,
        queue=options.queue,
        index_bytes=round(options.index_gb * GB),
        visual_tokens=(choices.default, choices.low, choices.high),
    )
    return Service(
        engine,
        Chooser(choices, auto),
        options.model_name or options.checkpoint.resolve().name,
        model.processor.template,
        limits,
        Web(hosts, limits.body_bytes) if hosts else None,
    )


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for a flag whose number is infinite, none, or too small to be of use."""
    for flag, least in (
        ("--deadline", 1e-3),
        ("--drain", 0.0),
        ("--index-gb", 0.0),
        ("--most-mb", 1 / 2**20),
        ("--most-megapixels", 1e-6),
        ("--target-ms", 1e-3),
    ):
        if (value := getattr(options, flag[2:].replace("-", "_"))) is not None:
            parsing.number(value, flag, least=least)


def mesh_of(text: str | None) -> Any:
    """The mesh of --mesh, or of one device."""
    import jax

    from vlm_jax import mesh

    if text is not None:
        return mesh.make(**mesh.sizes(text))
    if (count := jax.device_count()) > 1:
        progress.say(f"1 of {count} devices is used: --mesh=tensor=N splits the model over N")
    return mesh.make(devices=jax.devices()[:1])


def page_of(service: Any, *, with_key: bool) -> str:
    """The page at /."""
    from vlm_jax.reports import chat_page

    choices = service.chooser.choices
    return chat_page.build(
        service.name,
        list(choices.supported),
        choices.default,
        auto=service.chooser.auto.describe(),
        with_key=with_key,
    )
