"""TAB completion in real shells: commands, flags, values, config keys and files."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ocrnet.cli import main
from ocrnet.cli.flags import FLAGS

TYPED = {
    "ocrnet tr": "ocrnet train ",
    "ocrnet train --mi": "ocrnet train --mix ",
    "ocrnet train --mix F": "ocrnet train --mix False ",
    "ocrnet train --config r": "ocrnet train --config run.yml ",
    "ocrnet train --set mix=True data.cro": "ocrnet train --set mix=True data.crop_size=",
    "ocrnet train --set norm=s": "ocrnet train --set norm=sync ",
    "ocrnet train --resume_ckpt a": "ocrnet train --resume_ckpt auto ",
    "ocrnet export --format op": "ocrnet export --format openvino ",
    "ocrnet predict ru": "ocrnet predict run.",
    "ocrnet synthetic --si": "ocrnet synthetic --size ",
    "ocrnet completion f": "ocrnet completion fish ",
}


def script(shell: str, capsys) -> str:
    assert main.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("run.yml", "run.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bash_completes_commands_flags_values_and_files(folder, capsys):
    (folder / "rc").write_text(script("bash", capsys) + "PS1='> '\nbind 'set enable-bracketed-paste off'\n")
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("bash", ["bash", "--noprofile", "--rcfile", str(folder / "rc"), "-i"], os.environ | {"TERM": "dumb"})
    try:
        assert read(terminal, "> ")
        for typed, completed in TYPED.items():
            os.write(terminal, f"{typed}\t".encode())
            assert read(terminal, completed).endswith(completed)
            os.write(terminal, b"\x15")  # Ctrl-U: an empty line
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)


def read(terminal: int, text: str) -> str:
    """Return the output of the terminal up to ``text``, or of ten seconds."""
    output, end = "", time.monotonic() + 10
    while not output.endswith(text) and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            # bash rings the bell if there are several completions.
            output += os.read(terminal, 4096).decode().replace("\a", "")
    return output


def test_every_flag_of_every_command_is_in_each_script(capsys):
    for shell, form in (("bash", "--{}"), ("zsh", "--{}["), ("fish", " -l {} ")):
        text = script(shell, capsys)
        for flag in FLAGS:
            assert form.format(flag.name) in text
        for name in main.COMMANDS:
            assert name in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_has_valid_syntax(shell, folder, capsys):
    if not shutil.which(shell):
        pytest.skip(f"this machine has no {shell}")
    (folder / "rc").write_text(script(shell, capsys))
    subprocess.run([shell, "-n", "rc"], check=True)


def test_an_unknown_shell_is_an_error(capsys):
    assert main.main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err.startswith("error: argument shell: invalid choice: 'tcsh'")
