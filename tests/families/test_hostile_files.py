"""Files that try to run code or exhaust memory, and truncated files, are rejected in one line and leave no files."""

import builtins
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from family_nets import Mmseg, Paddle, fill

from ocrnet.cli.main import main
from ocrnet.weights import ckpt, pickles

SIZES = (4, 1, (1, 1, 1), 3, 8, 4)
HUGE = 10**10

# Converts each file, with a limit of 512 MiB above the memory in use after all imports.
LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
import ocrnet.weights.pth
from ocrnet.cli.main import main

torch.set_num_threads(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + (512 << 20)] * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
statuses = {}
for path in sys.argv[1:]:
    statuses[path] = main(["convert", "--input", path, "--output", path + ".safetensors"])
    print("===", file=sys.stderr, flush=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([statuses, (peak - before) >> 10]))
"""


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(folder):
    return Calls(os.system, f"touch {folder}/owned")


def harmless():
    return {"conv1.weight": np.ones((2, 3), np.float32)}


def save_array(shape=(2, 3), content=b"\0" * 24, code="f4", function="_reconstruct", kind=b"cnumpy\nndarray\n"):
    """Return the pickle of {"x": array}, assembled from parts that may be invalid."""

    def text(string):
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    def integer(number):
        raw = number.to_bytes(12, "little")
        return b"\x8a" + bytes([len(raw)]) + raw

    make = b"cnumpy.core.multiarray\n" + function.encode() + b"\n" + kind + b"K\0\x85C\x01b\x87R"
    sides = b"(" + b"".join(map(integer, shape)) + b"t"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(code)
        + b"\x89\x88\x87R(K\3"
        + text("<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    state = b"(K\1" + sides + dtype + b"\x89B" + struct.pack("<I", len(content)) + content + b"tb"
    return b"\x80\x03}" + text("x") + make + state + b"s."


def billion_laughs():
    """Return the pickle of 40 nested lists, each of which holds the previous one ten times: 10^40 items in total."""
    lists = b"".join(b"\x8c\1" + bytes([65 + i]) + b"](" + (b"h" + bytes([i])) * 10 + b"e\x94s" for i in range(40))
    return b"\x80\x04}\x8c\1a]\x94s" + lists + b"."


def pickled_attacks(folder):
    """Return by name the bytes of a .pdparams file and a part of the expected error message."""
    code = "could run code"
    own = f"touch {folder}/owned"
    return {
        "system": (pickle.dumps(harmless() | {"x": touch(folder)}, 2), code),
        "system4": (pickle.dumps(harmless() | {"x": touch(folder)}, 4), code),
        "eval": (pickle.dumps(harmless() | {"x": Calls(eval, f"__import__('os').system('{own}')")}, 4), code),
        "exec": (pickle.dumps(OrderedDict(x=Calls(exec, f"import os; os.system('{own}')")), 2), code),
        "getattr": (pickle.dumps({"x": Calls(getattr, "x", "upper")}, 4), code),
        "nested": (b"\x80\x04cbuiltins\ngetattr\n(cos\npath\nX\x02\0\0\0ostR.", code),
        "dotted": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(own)]) + own.encode() + b"\x85R.", code),
        "numpy_load": (b"\x80\x02cnumpy\nload\nX\x01\0\0\0xR.", code),
        "inst": (b"\x80\x02(X" + struct.pack("<I", len(own)) + own.encode() + b"ios\nsystem\n.", code),
        "persistent": (b"\x80\x02X\x01\0\0\0xQ.", code),
        "extension": (b"\x80\x02\x82\x01.", code),
        "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", code),
        "reconstruct": (save_array(kind=b"cos\nsystem\n"), code),
        "reconstruct_odd": (save_array(kind=b"cnumpy\ndtype\n"), "unknown way"),
        "call_ndarray": (b"\x80\x02cnumpy\nndarray\n(K\5\x85tR.", "unknown way"),
        "object_array": (save_array(code="O8", content=bytes(48)), "only numbers"),
        "build_dict": (b"\x80\x02}}b.", "the state of an object that has none"),
        "unfinished": (
            b"\x80\x02}X\1\0\0\0xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87Rs.", "no state"
        ),
        "huge_array": (save_array(shape=(HUGE, HUGE)), "do not match its shape"),
        "negative": (save_array(shape=(2**90,)), "do not match its shape"),
        "huge_bytes": (b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"x.", "10,000,000,000 bytes are claimed"),
        "huge_text": (b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x.", "10,000,000,000 bytes are claimed"),
        "huge_number": (b"\x80\x04\x8b\xff\xff\xff\x7fx.", "bytes are claimed"),
        "huge_memo": (b"\x80\x04}r\xff\xff\xff\xff.", "no state dict"),
        "laughs": (billion_laughs(), "nested too deeply"),
        "endless": (b"\x80\x04}\x94\x8c\x01xh\0s.", "nested too deeply"),
        "encode": (
            b"\x80\x02](X" + struct.pack("<I", 1000) + b"x" * 1000 + b"q\0X\6\0\0\0latin1q\1"
            + b"c_codecs\nencode\nh\0h\1\x86R" * 200 + b"e.",
            "more bytes than the file has",
        ),
        "same_bytes": (pickle.dumps({f"x{i}": SHARED for i in range(200)}, 4), "its arrays claim"),
        "protocol5": (pickle.dumps(harmless(), 5), "protocol 5"),
        "empty": (pickle.dumps({}, 2), "no state dict"),
        "text": (pickle.dumps("weights", 4), "no state dict"),
        "no_end": (b"\x80\x04}", "truncated"),
        "no_stack": (b"\x80\x04ss.", "truncated or altered"),
    }  # fmt: skip


SHARED = np.zeros(10, np.float32)


def torch_attacks(folder):
    tensor = torch.ones(2, 3)
    state = {"conv1.weight": tensor}
    contents = {
        "system": {**state, "x": touch(folder)},
        "eval": {**state, "x": Calls(builtins.eval, f"__import__('os').system('touch {folder}/owned')")},
        "getattr": {**state, "x": Calls(getattr, "x", "upper")},
        "numpy": {"state_dict": state, "best_mean_iu": np.float64(0.8)},
    }
    return {
        name: (content, "could run code, so it is refused; if you trust its source")
        for name, content in contents.items()
    }


def bombs(folder):
    """Write small files that claim a large size; return by name a part of the expected error message."""
    plain = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(2, 3)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(folder / "zip_deflated.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, bytes(300 << 20) if name.endswith("data/0") else source.read(name))
    content = bytearray(plain.getvalue())
    for entry in zipfile.ZipFile(plain).infolist():
        if entry.filename.endswith("data/0"):  # change the sizes only in the central directory
            place = content.rindex(b"PK\1\2", 0, content.rindex(entry.filename.encode()))
            content[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
    (folder / "zip_lies.pth").write_bytes(content)
    torch.save({"conv1.weight": torch.zeros(1).expand(HUGE)}, folder / "expanded.pth")
    legacy = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(7)}, legacy, _use_new_zipfile_serialization=False)
    seven = b"\x8a\5" + HUGE.to_bytes(5, "little")
    (folder / "legacy_claims.pth").write_bytes(legacy.getvalue().replace(b"K\7", seven))
    assert seven in (folder / "legacy_claims.pth").read_bytes()
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", HUGE) + b'{"x":' + b" " * 100)
    header = json.dumps({"x": {"dtype": "F32", "shape": [HUGE // 4], "data_offsets": [0, HUGE]}}).encode()
    (folder / "offsets.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    (folder / "record.ckpt").write_bytes(b"\n\x80\xc8\xaf\xa0\x25" + b"x" * 100)
    return {
        "zip_deflated.pth": "is compressed",
        "zip_lies.pth": "its entries claim",
        "expanded.pth": "its tensors claim 40,000,000,000 bytes",
        "legacy_claims.pth": "legacy_claims.pth",
        "header.safetensors": "its header claims 10,000,000,000 bytes",
        "offsets.safetensors": "truncated or altered",
        "record.ckpt": "claims 10,000,000,000 bytes",
    }


def truncated(folder):
    """Write a valid file of each kind, truncated near its start, in its middle and near its end; yield the names."""
    state, paddle = fill(Mmseg(*SIZES)).state_dict(), fill(Paddle(*SIZES)).state_dict()
    torch.save(state, folder / "whole.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "whole.pdparams").write_bytes(pickle.dumps({k: v.numpy() for k, v in paddle.items()}, 4))
    ckpt.write(folder / "whole.ckpt", {k: v.numpy() for k, v in state.items()})
    assert main(["convert", "--input", str(folder / "whole.pth"), "--output", str(folder / "whole.safetensors")]) == 0
    for name in ("whole.pth", "legacy.pth", "whole.pdparams", "whole.ckpt", "whole.safetensors"):
        content = (folder / name).read_bytes()
        for part in (0.01, 0.5, 0.999):
            cut = folder / f"cut{part}_{name}"
            cut.write_bytes(content[: int(len(content) * part)])
            yield cut.name


def test_hostile_files_run_no_code_take_little_memory_and_give_a_one_line_error(tmp_path, capsys):
    expected: dict[str, str | None] = {}
    for name, (content, message) in pickled_attacks(tmp_path).items():
        (tmp_path / f"{name}.pdparams").write_bytes(content)
        expected[f"{name}.pdparams"] = message
    for name, (content, message) in torch_attacks(tmp_path).items():
        for zipped in (True, False):
            torch.save(content, tmp_path / f"{name}{zipped}.pth", _use_new_zipfile_serialization=zipped)
            expected[f"{name}{zipped}.pth"] = message
    expected |= bombs(tmp_path)
    expected |= {name: name for name in truncated(tmp_path)}
    assert "wrote" in capsys.readouterr().out
    before = {path.name for path in tmp_path.iterdir()}
    paths = [str(tmp_path / name) for name in expected]
    completed = subprocess.run(
        [sys.executable, "-c", LIMITED, *paths], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    statuses, memory_growth = json.loads(completed.stdout.splitlines()[-1])
    messages = completed.stderr.split("===\n")
    for path, text in zip(paths, messages, strict=False):
        name = Path(path).name
        assert statuses[path] == 2, (name, text)
        assert text.startswith("error: "), (name, text)
        assert text.count("\n") == 1, (name, text)
        assert name in text
        assert expected[name] is None or expected[name] in text, (name, text)
    assert memory_growth < 200, f"peak memory grew by {memory_growth} MiB"
    assert {path.name for path in tmp_path.iterdir()} == before  # no output, no temporary file, no file "owned"


def test_the_attacks_run_code_when_unpickled_without_restrictions(tmp_path):
    content = pickled_attacks(tmp_path)
    for name in ("system", "system4", "eval", "exec", "dotted", "inst"):
        with np.testing.suppress_warnings():
            pickle.loads(content[name][0])
        assert (tmp_path / "owned").exists(), name
        (tmp_path / "owned").unlink()
    for name in ("system", "eval"):
        buffer = io.BytesIO()
        torch.save(torch_attacks(tmp_path)[name][0], buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert (tmp_path / "owned").exists(), name
        (tmp_path / "owned").unlink()


@pytest.mark.parametrize("protocol", pickles.PROTOCOLS)
def test_pickled_data_is_read_unchanged(tmp_path, protocol):
    data = {
        "f": np.arange(6, dtype="f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(300, dtype=">f2"),
        "bool": np.array([True, False]),
        "no axis": np.array(2, np.int64),
    }
    plain = {"t": ("n", None), "l": [1, 2.5, True, False, -7, 300, 70000, 2**40, "é"], "n": 3, 5: b"bytes"}
    plain |= {f"k{i}": i for i in range(3000)}
    (tmp_path / "a").write_bytes(pickle.dumps({**data, **plain, "scalar": np.float32(2), "o": OrderedDict()}, protocol))
    found = pickles.read(tmp_path / "a")
    for name, array in data.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
    assert {name: found[name] for name in plain} == plain
    assert (found["scalar"], found["o"]) == (2, {})
