"""`ocrnet export --format triton`: config.pbtxt describes the ONNX file, whose labels match the PyTorch engine."""

import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

import ocrnet
from ocrnet import architecture, config
from ocrnet.cli import main
from ocrnet.config import Config
from ocrnet.export.compare import draw
from ocrnet.weights import checkpoint

SMALL = {"width": 6, "blocks": 1, "modules": (1, 1, 1), "num_classes": 5, "channels": 16, "key_channels": 8}


def model_config():
    """Return an empty ModelConfig of Triton with the fields of its model_config.proto that the export writes."""
    proto = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    types = {
        "string": field.TYPE_STRING,
        "int32": field.TYPE_INT32,
        "int64": field.TYPE_INT64,
        "uint64": field.TYPE_UINT64,
    }
    names = (
        "INVALID",
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "FP32",
    )
    enum = proto.enum_type.add(name="DataType")
    for number, name in enumerate(names):
        enum.value.add(name=f"TYPE_{name}", number=number)
    tensor = [("name", "string", False), ("data_type", ".inference.DataType", False), ("dims", "int64", True)]
    for message, fields in {
        "ModelInput": tensor,
        "ModelOutput": tensor,
        "ModelDynamicBatching": [("max_queue_delay_microseconds", "uint64", False)],
        "ModelConfig": [
            ("name", "string", False), ("backend", "string", False), ("max_batch_size", "int32", False),
            ("input", ".inference.ModelInput", True), ("output", ".inference.ModelOutput", True),
            ("dynamic_batching", ".inference.ModelDynamicBatching", False),
        ],
    }.items():  # fmt: skip
        message_type = proto.message_type.add(name=message)
        for number, (name, kind, repeated) in enumerate(fields, 1):
            entry = message_type.field.add(
                name=name, number=number, label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            )
            if kind in types:
                entry.type = types[kind]
            else:
                entry.type_name = kind
                entry.type = field.TYPE_ENUM if kind.endswith("DataType") else field.TYPE_MESSAGE
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def read_config(folder):
    """Return batch size, queue delay, and (name, type, dims) of input and output from config.pbtxt."""
    parsed = text_format.Parse((folder / "config.pbtxt").read_text(), model_config())
    tensors = [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in (*parsed.input, *parsed.output)]
    assert (parsed.backend, parsed.name) == ("onnxruntime", "")  # without a name, Triton uses the folder's
    delay = parsed.dynamic_batching.max_queue_delay_microseconds if parsed.HasField("dynamic_batching") else None
    return parsed.max_batch_size, delay, *tensors


UINT8, FP32 = 2, 11


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    checkpoint.save(
        path, architecture.init(architecture.Arch(**SMALL), 3), {"config": config.as_dict(Config()), "step": 7}
    )
    return path


def export(small, folder, *flags):
    argv = ["export", "--checkpoint_path", str(small), "--output", str(folder), "--format", "triton"]
    return main.main([*argv, "--num_images", "1", *flags])


def test_the_config_matches_the_onnx_file_of_any_or_one_size(small, tmp_path, capsys):
    folder = tmp_path / "models" / "street"
    assert export(small, folder, "--dynamic", "True", "--size", "64,96") == 0
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "1/model.onnx", "MODEL_CARD.md", "config.pbtxt",
    ]  # fmt: skip
    assert read_config(folder) == (8, 5000, ("images", UINT8, [-1, -1, 3]), ("labels", UINT8, [-1, -1]))
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    model = ocrnet.load(small, engine="torch", device_target="CPU")
    for size in ((64, 96), (50, 77)):
        images = np.stack([draw(size, number) for number in range(3)])
        batch = session.run(None, {"images": images})[0]  # as Triton batches requests of one size
        assert (batch.shape, batch.dtype) == ((3, *size), np.uint8)
        for image, labels in zip(images, batch, strict=True):
            np.testing.assert_array_equal(labels, session.run(None, {"images": image[None]})[0][0])
            assert np.mean(labels == model.predict(image)) > 0.999
    # A model that an earlier export wrote is replaced; the new one has a fixed size, so it is not batched.
    assert export(small, folder, "--size", "64,96", "--input", "normalized", "--outputs", "probabilities") == 0
    assert read_config(folder) == (0, None, ("images", FP32, [1, 3, 64, 96]), ("probabilities", FP32, [1, 5, 64, 96]))


def test_a_folder_with_other_files_is_not_overwritten(small, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("x")
    assert export(small, tmp_path) == 2
    assert "is not a model of a Triton repository" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
