"""``attnopt optimize | inspect | verify | generate | bench | export | explain | env``: options, exit codes, and what is said when something goes wrong.

Exit codes: 0 done; 1 a policy was not met (verification failed, ``--require-all`` missed, a prompt that could not run); 2 bad usage, or a model that
cannot be loaded or captured; 101 a bug of attnopt. Everything heavy is imported when a command needs it.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from attnopt.config import BACKENDS, KV_CACHE_DTYPES, KV_CACHES, OptimizeConfig
from attnopt.errors import AttnoptError

POLICY, USAGE, BUG, INTERRUPTED = 1, 2, 101, 130

Command = Callable[..., int]


def main() -> None:
    """The console script."""
    sys.exit(run())


def run(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code. ``argv`` leaves out the program's name."""
    argv = sys.argv[1:] if argv is None else argv
    with_traceback = "--traceback" in argv
    if not with_traceback:  # advice of libraries to those who write libraries is nothing that a user can act on
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
    try:
        return int(app.main(args=argv, prog_name="attnopt", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        return INTERRUPTED
    except AttnoptError as error:
        if with_traceback:
            traceback.print_exc()
        _say_error(error.message, error.hint, as_json="--json" in argv, code=error.exit_code)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - whatever is left is a bug of ours, and said to be one
        if with_traceback:
            traceback.print_exc()
        message = f"This is a bug in attnopt: {type(error).__name__}: {' '.join(str(error).split())}"
        hint = "Please report it with the model or the code it captures." + ("" if with_traceback else " Run again with --traceback to see where it happened.")
        _say_error(message, hint, as_json="--json" in argv, code=BUG)
        return BUG


def _say_error(message: str, hint: str, *, as_json: bool, code: int) -> None:
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(message, err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    if as_json:
        click.echo(json.dumps({"error": message, "hint": hint, "exit_code": code}))


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _bytes(text: str) -> int:
    """``512MiB``, ``8GiB``, ``1000000``: a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise click.BadParameter(f"{text!r} is no size; expected a number of bytes, or one with a unit such as 512MiB or 8GiB.")
    return int(float(found[1]) * _UNITS[found[2]])


def _numbers(text: str) -> tuple[int, ...]:
    """``1,4,16``: whole numbers from 1 on."""
    found = [x.strip() for x in text.split(",")]
    if not all(x.isdecimal() and int(x) for x in found):
        raise click.BadParameter(f"{text!r} is no list of numbers; expected one such as 1,4,16.")
    return tuple(int(x) for x in found)


_load_options = _options(
    click.option("--input", "inputs", multiple=True, metavar="NAME=DTYPE[SIZES]", help="An input, such as input_ids=int64[2,128]; once for each. Without any, example_inputs of the file."),
    click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32", "float64"]), help="Cast the model and its floating-point inputs."),
    click.option("--device", metavar="DEVICE", help="Where to run, such as cuda or cuda:1."),
    click.option("--attn-implementation", metavar="NAME", help="For a Hugging Face folder: the attention it is built with.  [default: eager]"),
)
_run_options = _options(
    _load_options,
    click.option("--train", is_flag=True, help="Training mode (otherwise eval): dropout stays, and time is that of forward and backward."),
)
_target = click.argument("target", metavar="MODEL")
_model_options = _options(_target, _run_options)
_pass_options = _options(
    click.option("--backend", default="auto", show_default=True, metavar="NAME", help=f"Kernel for every attention: {', '.join(BACKENDS)}; `attnopt env` says which can be used here."),
    click.option("--autotune", is_flag=True, help="With --backend auto: measure the backends that can compute an attention, on its own shapes, and take the fastest."),
    click.option("--disable-pass", "disable_passes", multiple=True, metavar="NAME", help="Leave a pass out; repeatable."),
    click.option("--print-ir-after", multiple=True, metavar="NAME", help="Print the graph after a pass (or `all`) to standard error; repeatable."),
    click.option("--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), help="With --kv-cache: keep keys and values in 8 bits, with a scale for each token and head."),
    click.option("--merge-kv-heads", type=int, metavar="N", help="Merge the KV heads of each attention into N by their mean: another model, to be trained further."),
    click.option("--capture", type=click.Choice(["auto", "export", "dynamo"]), default="auto", show_default=True, help="How the graph is captured."),
    click.option("--inductor/--no-inductor", default=True, show_default=True, help="Where torch.compile captures: hand the rewritten graph to Inductor, or run it eagerly."),
    click.option("--max-variants", type=click.IntRange(1), default=OptimizeConfig.max_variants, show_default=True, metavar="N", help="How many forms of call (mode, dtype, structure of the arguments) one model is captured for."),
    click.option("--kv-cache", type=click.Choice(KV_CACHES), help="Make a serving model of a decoder that was written without a cache: keys and values in pages, or in one piece for each request."),
)
_serving_options = _options(
    click.option("--kv-cache", type=click.Choice(KV_CACHES), default="paged", show_default=True, help="Keys and values in pages, or in one piece for each request."),
    click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Kernel for every attention; over a cache: triton or reference."),
    click.option("--disable-pass", "disable_passes", multiple=True, metavar="NAME", help="Leave a pass out; repeatable."),
    click.option("--print-ir-after", multiple=True, metavar="NAME", help="Print the graph after a pass (or `all`) to standard error; repeatable."),
    click.option("--page-size", type=click.IntRange(1), metavar="TOKENS", help="Tokens a page holds.  [default: 16; contiguous: the longest request]"),
    click.option("--cache-size", type=_bytes, metavar="SIZE", help="Memory for the cache, such as 512MiB or 8GiB.  [default: what the prompts need, 4GiB at most]"),
    click.option("--chunk", type=click.IntRange(1), metavar="TOKENS", help="Tokens of one prompt that a step computes at most.  [default: 2048]"),
    click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the serving model with the original first."),
)
_output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object to standard output and nothing else there."),
    click.option("--traceback", is_flag=True, help="Show where an error was raised."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="attnopt")
def app() -> None:
    """Finds every attention in a PyTorch model, replaces it with the fastest kernel that computes the same, and proves it."""


@app.command()
@_model_options
@_pass_options
@click.option("--output", "-o", type=click.Path(dir_okay=False), metavar="FILE", help="Save the optimized model; an ONNX file is written as one.")
@click.option("--emit", type=click.Choice(["pt2", "onnx"]), default="pt2", show_default=True, help="What --output is. pt2: a program that a fresh process loads after `import attnopt`. onnx: as `attnopt export` writes it.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the original.")
@click.option("--require-all", is_flag=True, help="Exit with 1 unless every attention was replaced.")
@click.option("--benchmark/--no-benchmark", default=True, show_default=True, help="Measure time and peak memory before and after.")
@click.option("--target", "form", type=click.Choice(["onnx", "ort"]), default="onnx", show_default=True, help="Of an ONNX file: what attentions become. onnx: the standard operator Attention. ort: operators of ONNX Runtime where they are exact.")
@click.option("--opset", type=int, default=24, show_default=True, help="Of an ONNX file: the version of its operators when it is written, 23 or 24.")
@_output_options
@click.pass_context
def optimize(context: click.Context, /, opset: int, form: Any, **options: Any) -> int:
    """Optimize MODEL: a file (model.py, model.py:name), a local Hugging Face folder, or an ONNX file.

    An ONNX file (model.onnx, of opset 13 to 25, by any exporter) is written anew to --output, which is an ONNX file then: every attention that is
    proven becomes an operator Attention, and the rest stays as it is. It is compared with the original in ONNX Runtime, over several shapes and
    paddings; where they differ nothing is written, and the exit code is 1. Of the options, --input, --output, --opset, --target, --require-all and --json apply.
    """
    from attnopt.cli.onnx_file import OPTIONS, is_onnx, optimize_file_command

    if is_onnx(options["target"]):
        other = [p.opts[0] for p in context.command.params if p.name not in OPTIONS and _given(context, p)]
        if other:
            raise click.UsageError(f"{other[0]} does not apply to an ONNX file; --input, --output, --opset, --target, --require-all and --json do.", context)
        names = ("target", "output", "inputs", "require_all", "as_json")
        return optimize_file_command(opset=opset, form=form, **{n: options[n] for n in names})
    from attnopt.cli.commands import optimize_command

    for name in ("opset", "target"):
        if _given(context, next(p for p in context.command.params if f"--{name}" in p.opts)):
            raise click.UsageError(f"--{name} applies to an ONNX file; a PyTorch model is written as ONNX by `attnopt export`, which has it too.", context)
    return optimize_command(**options)


@app.command()
@_model_options
@_pass_options
@_output_options
def inspect(**options: Any) -> int:
    """Show every attention in MODEL and what would be done with it."""
    from attnopt.cli.commands import inspect_command

    return inspect_command(**options)


@app.command()
@_model_options
@_pass_options
@click.option("--against", metavar="MODEL|FILE.pt2", help="A model or saved .pt2 file to compare with MODEL, instead of what attnopt makes of it.")
@_output_options
def verify(**options: Any) -> int:
    """Optimize MODEL and show every comparison with the original; exit with 1 when one is over its budget."""
    from attnopt.cli.commands import verify_command

    return verify_command(**options)


@app.command()
@_target
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT|IDS", help="What to continue: a text where the model has a tokenizer, otherwise token ids such as '1 2 3'; repeatable.")
@click.option("--prompts", "prompts_file", metavar="FILE.jsonl", help="One prompt a line: \"text\", [1, 2, 3], or an object with `prompt` and its own source, max_new_tokens, temperature, top_k, top_p, seed, stop. `-` is standard input.")
@click.option("--ids", is_flag=True, help="Every --prompt and --source is token ids, whatever tokenizer there is.")
@click.option("--source", "sources", multiple=True, metavar="TEXT|IDS", help="For a model that reads another sequence: what its encoder is given. One for all prompts, or one for each --prompt; in a file `source`.")
@click.option("--source-file", "source_files", multiple=True, metavar="FILE.npy|.pt", help="As --source, a tensor of a file (of one prompt, without padding); in a file of prompts `source_file`.")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="How many prompts run at once at most.  [default: 256]")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, metavar="N", help="Tokens to generate for each prompt at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the most likely token.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K most likely tokens only.")
@click.option("--top-p", type=float, default=1.0, show_default=True, metavar="P", help="Draw from the most likely tokens that add up to P only.")
@click.option("--seed", type=int, metavar="N", help="The same tokens again: prompt i is drawn with N + i.")
@click.option("--stop", multiple=True, metavar="TEXT|ID", help="A token id, or a text, that ends a continuation; repeatable. A text is left out of it.")
@click.option("--ignore-end", is_flag=True, help="Go on after the tokens with which a Hugging Face folder says that a text ends.")
@_load_options
@_serving_options
@_output_options
def generate(**options: Any) -> int:
    """Continue prompts with MODEL, a decoder that was written without a cache.

    MODEL is captured, gets a KV cache, and is compared with what it was; then all prompts run at once. `tokenizer` of a file (an object with encode and
    decode), or the one in a Hugging Face folder, makes text of token ids. A prompt that cannot run is told in one sentence, and the others go on; the exit
    code is 1 then.
    """
    from attnopt.cli.generate import generate_command

    return generate_command(**options)


@app.command()
@_model_options
@click.option("--decode", "decoding", is_flag=True, help="Measure generation: tokens per second of MODEL and of the serving model made of it.")
@click.option("--batch", "batches", type=_numbers, default="1,4,16", show_default=True, metavar="N,N,...", help="With --decode: how many prompts at once.")
@click.option("--prompt-length", "lengths", type=_numbers, default="32", show_default=True, metavar="N,N,...", help="With --decode: tokens of each prompt.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="With --decode: tokens to generate for each.")
@_serving_options
@_output_options
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> int:
    """Time and peak memory of MODEL before and after, measured in turn in one process.

    Without --decode: of a forward pass on its inputs (with --train, forward and backward). With it: of greedy generation from random prompts, prompts included. The
    original generates by its own `generate` with a cache where it has one, otherwise by the whole text through it for each token.
    """
    from attnopt.cli.bench import bench_command

    if not options["decoding"]:
        for p in context.command.params:
            if p.name in ("batches", "lengths", "new_tokens", "kv_cache", "page_size", "cache_size", "chunk") and _given(context, p):
                raise click.UsageError(f"{p.opts[0]} is for generation, and --decode was not given.", context)
    return bench_command(**options)


@app.command()
@_model_options
@click.option("--output", "-o", required=True, type=click.Path(), metavar="FILE.onnx", help="Where to write the model.")
@click.option("--target", "form", type=click.Choice(["onnx", "ort", "decomposed"]), default="onnx", show_default=True, help="onnx: the standard operator Attention where it is exact. ort: GroupQueryAttention and MultiHeadAttention of ONNX Runtime where they are, with a function of standard operators for other runtimes. decomposed: every attention in basic operators.")
@click.option("--opset", type=int, default=24, show_default=True, help="Version of the ONNX operators: 23 or 24.")
@click.option("--with-past", is_flag=True, help="A decoder with its KV cache as inputs and outputs, as onnxruntime-genai expects it, and genai_config.json beside it.")
@click.option("--static-cache", "max_length", type=click.IntRange(1), metavar="N", help="A decoder with caches of N tokens as inputs and outputs in place of a past that grows, written by TensorScatter at an index for each row.")
@click.option("--strip-metadata", is_flag=True, help="Leave specs, names of modules and versions out of the file.")
@_output_options
def export(**options: Any) -> int:
    """Write MODEL as ONNX with its attentions as fused nodes, and compare the file with MODEL in ONNX Runtime.

    The comparison runs several shapes and, where the model takes a mask, several paddings. When it fails nothing is written, and the exit code is 1.
    """
    from attnopt.cli.onnx import export_command

    if options["with_past"] and options["max_length"] is not None:
        raise click.UsageError("--with-past is for a past that grows, and --static-cache for one of a fixed length; give one of them.")
    return export_command(**options)


@app.command()
@click.argument("what", metavar="[MODEL | CODE]", required=False)
@click.option("--site", metavar="NAME", help="Of MODEL, only the attention of this name, replaced or not, such as layers.0.self_attn.")
@_run_options
@_pass_options
@_output_options
@click.pass_context
def explain(context: click.Context, /, what: str | None, **options: Any) -> int:
    """Explain what was found in MODEL, or the remark with this CODE.

    Of a MODEL (as for `optimize`): each attention that is missed or slower than it could be, and each softmax that is no
    attention, with its source line, the node of the graph that is in the way, the actual and the supported values, and what
    to change. With --site, one of them; of one that is replaced, what it was proven to be and which kernel runs it. The
    model is captured and analysed; nothing is changed or compared.

    Of a CODE such as AO203: what it means, why, what to change, and an example. Without either, the list of all codes.
    """
    from attnopt.cli.explain import explain_codes, explain_model, is_code

    if what is None or is_code(what):
        given = [p.opts[0] for p in context.command.params if p.name not in ("what", "as_json", "traceback") and _given(context, p)]
        if given:
            raise click.UsageError(f"{given[0]} needs a MODEL to explain, {'and none was given' if what is None else f'and {what} is a remark'}.", context)
        return explain_codes(what, options["as_json"])
    return explain_model(what, **options)


def _given(context: click.Context, parameter: click.Parameter) -> bool:
    return context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE


@app.command()
@_output_options
def env(as_json: bool, traceback: bool) -> int:
    """Versions, devices, and which backends can be used here, with the reason where one cannot."""
    from attnopt.cli.environment import env_command

    return env_command(as_json)
