"""`deeptalk-edge train`: make and adapt checkpoints.

train RECIPE            run a recipe: a TOML file, or one of ours by its name
train split             find the audio experts of an aligned checkpoint
train check             name every problem of some data
train speak             a CSV of questions and answers, spoken, as data to train on
train pairs             sample answers, score them, pick pairs for DPO
train merge             an adapter into its checkpoint
train plan              memory and time of a recipe, computed
train eval              score a checkpoint on data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from deeptalk_edge.flags import amount, count, count_or_zero


def _seed(text: str) -> int:
    from deeptalk_edge.model.noise import check_seed

    value = count_or_zero(text)
    check_seed(value)
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `train`: its first word chooses who reads the rest."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__.partition("\n\n")[2] if __doc__ else None
    parser.add_argument("action", metavar="RECIPE|ACTION", help="see above")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="`train ACTION --help` shows them"
    )


def main(args: argparse.Namespace) -> int:
    """Run a recipe or an action; returns the exit code. Raises EdgeError as they do."""
    action = args.action if args.action in _ACTIONS else "RECIPE"
    declare, work = _ACTIONS[action]
    words = args.rest if args.action in _ACTIONS else [args.action, *args.rest]
    summary = (work.__doc__ or "").partition("\n")[0]
    name = action if action != "RECIPE" else ""
    parser = argparse.ArgumentParser(
        prog=f"deeptalk-edge train {name}".strip(), description=summary
    )
    declare(parser)
    return work(parser.parse_args(words))


def _declare_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a TOML file, or the name of one of ours")
    _add_set(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint of `output`"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")


def _run(args: argparse.Namespace) -> int:
    """Train as a recipe says."""
    from deeptalk_edge.training.ranks import is_first, joined_by_torchrun
    from deeptalk_edge.training.stages.recipe import read_recipe
    from deeptalk_edge.training.stages.run import run_recipe

    recipe = read_recipe(args.recipe, args.set)
    with joined_by_torchrun():
        final = run_recipe(recipe, resume=args.resume, device=args.device)
        if is_first():
            print(f"{final}: done; export it with `deeptalk-edge export {final} -o BUNDLE`")
    return 0


def _declare_split(parser: argparse.ArgumentParser) -> None:
    from deeptalk_edge.training.expert_split import LoadBy

    parser.add_argument("checkpoint", type=Path, help="an aligned checkpoint")
    parser.add_argument("data", nargs="+", help="TASK=PATH of conversations, or PATH")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument(
        "--count", default="adaptive", help="audio experts of each layer, or adaptive (default)"
    )
    parser.add_argument(
        "--by", choices=get_args(LoadBy), default="hits", help="how load is counted"
    )
    parser.add_argument("--page", type=Path, help="an HTML page with the table and the heat map")
    parser.add_argument("--max-samples", type=count, default=2000, help="to look at (default 2000)")


def _split(args: argparse.Namespace) -> int:
    """Find the audio experts of an aligned checkpoint."""
    from deeptalk_edge.training.stages.split import split_checkpoint

    print(
        split_checkpoint(
            args.checkpoint,
            args.data,
            args.out,
            count=args.count,
            by=args.by,
            page=args.page,
            max_samples=args.max_samples,
        )
    )
    return 0


def _declare_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", help="TASK=PATH of conversations, or PATH")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="whose vocabulary and tokenizer they meet"
    )
    parser.add_argument("--max-rows", type=count, default=1000)
    parser.add_argument("--preference", action="store_true", help="the data are pairs for DPO")


def _check(args: argparse.Namespace) -> int:
    """Name every problem of some data, with file and line."""
    from deeptalk_edge.training.data.check import check_data

    num_good, problems = check_data(
        args.checkpoint, args.data, max_rows=args.max_rows, is_preference=args.preference
    )
    for problem in problems:
        print(problem)
    print(f"{num_good} samples are good, {len(problems)} are bad")
    return 1 if problems else 0


def _declare_speak(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("csv", type=Path, help="columns question, answer; see the page")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--takes", type=count_or_zero, default=24, help="voices a question (default 24)"
    )
    parser.add_argument(
        "--held-out",
        type=count_or_zero,
        default=3,
        help="voices more that training never hears (default 3)",
    )
    parser.add_argument("--seed", type=_seed, default=0)


def _speak(args: argparse.Namespace) -> int:
    """Speak a CSV of questions and answers, as data to train on."""
    from deeptalk_edge.training.kiosk import speak_table

    made = speak_table(
        args.csv,
        args.checkpoint,
        args.out,
        num_takes=args.takes,
        num_held_out=args.held_out,
        seed=args.seed,
    )
    print(
        f"{args.out}: {made.num_train} spoken questions to train on, {made.num_held_out} held out"
    )
    return 0


def _declare_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="that the adapter was trained on")
    parser.add_argument("adapter", type=Path, help="`final` of a run with lora.keep = adapter")
    parser.add_argument("-o", "--out", type=Path, required=True, help="checkpoint to write")


def _merge(args: argparse.Namespace) -> int:
    """Add an adapter to the checkpoint it was trained on, ready to export."""
    from deeptalk_edge.training.stages.merge import merge

    merge(args.checkpoint, args.adapter, args.out)
    print(f"{args.out}: done; export it with `deeptalk-edge export {args.out} -o BUNDLE`")
    return 0


def _declare_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", nargs="+", help="TASK=PATH of conversations, or PATH")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the JSONL to write")
    parser.add_argument("--samples", type=count, default=4, help="answers to each question")
    parser.add_argument("--temperature", type=amount, default=1.0)
    parser.add_argument("--top-k", type=count, default=10, help="codes to draw from (default 10)")
    parser.add_argument("--max-samples", type=count, default=200, help="questions (default 200)")
    parser.add_argument("--seed", type=_seed, default=0)


def _pairs(args: argparse.Namespace) -> int:
    """Sample answers, score what they sound like, and pick pairs for DPO."""
    from deeptalk_edge.training.preference import make_pairs

    print(
        make_pairs(
            args.checkpoint,
            args.data,
            args.out,
            num_samples=args.samples,
            temperature=args.temperature,
            top_k=args.top_k,
            max_questions=args.max_samples,
            seed=args.seed,
        )
    )
    return 0


def _declare_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a TOML file, or the name of one of ours")
    _add_set(parser)
    parser.add_argument("--gpus", type=count, default=8)
    parser.add_argument("--gpu-gb", type=amount, default=80.0, help="memory of one (default 80)")
    parser.add_argument("--samples", type=count, help="of an epoch, for the time")
    parser.add_argument(
        "--rows", type=count, default=600, help="mean rows of a sample (default 600)"
    )
    parser.add_argument("--tflops", type=amount, default=300.0, help="that one GPU reaches in bf16")


def _plan(args: argparse.Namespace) -> int:
    """What a recipe needs: parameters, memory of each GPU, time; computed, not measured."""
    from deeptalk_edge.training.plan import Machine, plan_recipe
    from deeptalk_edge.training.stages.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.set)
    machine = Machine(num_gpus=args.gpus, gpu_gb=args.gpu_gb, tflops=args.tflops)
    plan = plan_recipe(recipe, machine, num_rows=args.rows, num_samples=args.samples)
    print(plan.text())
    return 0 if plan.fits else 1


def _declare_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", nargs="+", help="TASK=PATH of conversations, or PATH")
    parser.add_argument("--base", type=Path, help="a checkpoint to compare the language with")
    parser.add_argument("--max-samples", type=count, default=200)
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")


def _eval(args: argparse.Namespace) -> int:
    """Score a checkpoint: text, speech, codebooks; typed beside spoken."""
    from deeptalk_edge.training.evaluate import evaluate_checkpoint

    scores = evaluate_checkpoint(
        args.checkpoint, args.data, base=args.base, max_samples=args.max_samples
    )
    print(scores.json() if args.json else scores.text())
    return 0


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of the recipe, such as data.batch_size=8; may be repeated",
    )


Declare = Callable[[argparse.ArgumentParser], None]
_ACTIONS: dict[str, tuple[Declare, Callable[[argparse.Namespace], int]]] = {
    "RECIPE": (_declare_run, _run),
    "split": (_declare_split, _split),
    "check": (_declare_check, _check),
    "speak": (_declare_speak, _speak),
    "pairs": (_declare_pairs, _pairs),
    "merge": (_declare_merge, _merge),
    "plan": (_declare_plan, _plan),
    "eval": (_declare_eval, _eval),
}
__all__: Sequence[str] = ("add_arguments", "main")
