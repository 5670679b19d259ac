import pickle
import tracemalloc
from copy import copy, deepcopy
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys import checks, messages
from fedsys.arrays import TensorArray, tensor_of
from fedsys.engines.local import LocalGrid
from fedsys.errors import ClientFailure
from fedsys.params import Layout

LocalGrid(ClientApp(), 1)  # Flower refuses to make messages outside an engine

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (2, 3), (2, 1, 4, 3)]


def tensor(shape, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=draw) * 2).to(dtype)


SENT = {"w": tensor((3, 2)), "b": tensor((4,)), "steps": torch.tensor(7)}


def saved(array: np.ndarray, **options) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def asked() -> Message:
    return Message(RecordDict(), 2, "train", group_id="1")


def replied(arrays, metrics=None, **records) -> Message:
    content = RecordDict({"arrays": arrays} if arrays is not None else {})
    content["metrics"] = MetricRecord({"num-examples": 3} if metrics is None else metrics)
    for name, record in records.items():
        content[name] = record
    return Message(content, reply_to=asked())


def arrays(**changes) -> ArrayRecord:
    record = ArrayRecord({name: t + t.new_ones(()) for name, t in SENT.items()})
    for name, change in changes.items():
        if change is None:
            del record[name]
        else:
            record[name] = change if isinstance(change, Array) else Array(change.numpy())
    return record


def read(reply, **options):
    return checks.read_update(reply, 5, messages.encode(SENT), **options)


def reason(reply, **options) -> str:
    with pytest.raises(ClientFailure) as caught:
        read(reply, **options)
    assert caught.value.client == 5
    return caught.value.reason


# ---- arrays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_array_is_what_flower_makes_of_the_tensor(shape, dtype):
    value = tensor(shape, dtype)
    ours, theirs = TensorArray(value), Array(value.numpy())
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ours.data == theirs.data
    assert ours.object_id == theirs.object_id
    assert np.array_equal(ours.numpy(), theirs.numpy())
    for array in (ours, theirs):
        assert torch.equal(tensor_of(array), value)
        assert tensor_of(array).dtype == dtype


def test_tensor_array_of_a_parameter_or_a_view_or_a_transpose():
    weight = torch.nn.Parameter(tensor((4, 3)))
    for value in (weight, weight.T, weight[1:3], weight[:, ::2]):
        assert torch.equal(tensor_of(Array(TensorArray(value).numpy())), value)
        assert torch.equal(tensor_of(TensorArray(value).plain), value)
        assert not TensorArray(value).tensor.requires_grad


def test_no_reader_can_change_the_tensor_of_another():
    value = tensor((3,))
    array = TensorArray(value.clone())
    array.numpy()[:] = 9
    ArrayRecord({"x": array}).to_torch_state_dict()["x"].fill_(9)
    with pytest.raises(AttributeError):
        array.data = b""
    assert torch.equal(array.tensor, value)


def test_tensor_array_survives_copies_and_pickles_after_its_hash_was_taken():
    array = TensorArray(tensor((3, 2)))
    array.object_id  # noqa: B018
    for other in (copy(array), deepcopy(array), pickle.loads(pickle.dumps(array))):
        assert type(other) is TensorArray
        assert torch.equal(other.tensor, array.tensor)


def test_tensor_array_travels_as_flowers_array():
    """Take a message apart and build it again as a SuperLink and a SuperNode do."""
    content = RecordDict({"arrays": messages.encode(SENT), "c": ConfigRecord({"round": 1})})
    sent = Message(content, 2, "train", group_id="1")
    objects = {i: o.deflate() for i, o in get_all_nested_objects(sent).items()}
    classes = {type(o).__name__: type(o) for o in get_all_nested_objects(sent).values()}
    classes["Array"] = Array
    built = {}
    for name, data in objects.items():  # children come before their parents
        kind = classes[get_object_type_from_object_content(data)]
        children = {i: built[i] for i in get_object_children_ids_from_object_content(data)}
        built[name] = kind.inflate(data, children)
    received = built[sent.object_id].content["arrays"]
    assert all(type(array) is Array for array in received.values())
    back = messages.decode(received)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in SENT.items())


def test_flowers_fedavg_gives_the_same_bits_from_either_kind_of_array():
    def aggregate(make):
        replies = []
        for seed in range(3):
            state = {"w": tensor((3, 2), seed=seed), "b": tensor((5,), seed=seed + 9)}
            replies.append(replied(make(state), {"num-examples": seed + 1}))
        return FlowersFedAvg().aggregate_train(1, replies)[0].to_torch_state_dict()

    ours, theirs = aggregate(messages.encode), aggregate(ArrayRecord)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"PK\x03\x04" + bytes(100),
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        saved(np.ones(4, np.float32))[:-1],
        saved(np.ones(4, np.float32)) + b"\0",
        saved(np.ones(4, np.float32))[:60],
        saved(np.ones(4, ">f4")),
        saved(np.ones(4, "f4,i4")),
        saved(np.array(["a", "b", "c", "d"])),
        saved(np.array([1, "x", None, {}], dtype=object), allow_pickle=True),
        saved(np.ones(4, np.complex64)),
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f3', 'fortran_order': False, 'shape': (4,), }",
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    ],
)
def test_bytes_that_are_no_plain_array_are_refused(data):
    with pytest.raises(ValueError, match="cannot be decoded"):
        tensor_of(Array("float32", (4,), "numpy.ndarray", data))


def test_a_pickle_is_never_opened():
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    data = saved(np.array([Bomb()], dtype=object), allow_pickle=True)
    for claimed in ("float32", "object"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            tensor_of(Array(claimed, (1,), "numpy.ndarray", data))
    for raw in (pickle.dumps(Bomb()), b"\x93NUMPY\x01\x00" + pickle.dumps(Bomb())):
        with pytest.raises(ValueError, match="cannot be decoded"):
            tensor_of(Array("float32", (1,), "numpy.ndarray", raw))


@pytest.mark.parametrize(
    ("dtype", "shape", "stype"),
    [
        ("float64", (4,), "numpy.ndarray"),
        ("float32", (5,), "numpy.ndarray"),
        ("float32", (2, 2), "numpy.ndarray"),
        ("float32", (4, 1), "numpy.ndarray"),
        ("float32", (4,), "torch.pickle"),
    ],
)
def test_an_array_that_lies_about_itself_is_refused(dtype, shape, stype):
    with pytest.raises(ValueError, match="cannot be decoded"):
        tensor_of(Array(dtype, shape, stype, saved(np.ones(4, np.float32))))


def test_a_claim_of_a_billion_numbers_allocates_nothing():
    honest = saved(np.ones((1000,), np.float32))
    data = honest.replace(b"(1000,), }      ", b"(1000000000,), }")
    assert len(data) == len(honest)
    tracemalloc.start()
    with pytest.raises(ValueError, match="are not"):
        tensor_of(Array("float32", (1_000_000_000,), "numpy.ndarray", data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("order", ["C", "F"])
def test_either_memory_order_is_read(order):
    values = np.asarray(np.arange(12.0).reshape(3, 4), order=order)
    assert np.array_equal(tensor_of(Array(values)).numpy(), values)


# ---- records


def test_packed_and_named_records_hold_the_same():
    params = {"w": tensor((3, 2)), "b": tensor((4,))}
    layout = Layout.of(params)
    packed = messages.encode(params, layout)
    assert list(packed) == ["packed"]
    assert packed["packed"].shape == (10,)
    for record in (packed, messages.encode(params)):
        back = messages.decode(record, layout)
        assert all(torch.equal(back[name], params[name]) for name in params)


@pytest.mark.parametrize("layout", [None, Layout({"w": torch.Size([9])}, torch.float32)])
def test_a_packed_vector_that_does_not_fit_is_refused(layout):
    with pytest.raises(ValueError, match="does not fit"):
        messages.decode(messages.encode_flat(tensor((10,))), layout)


def test_missing_records_are_named():
    for get in (messages.arrays_of, messages.config_of):
        with pytest.raises(ValueError, match="the message has no"):
            get(RecordDict({"metrics": MetricRecord()}))


# ---- replies


def test_an_update_is_the_difference():
    update = read(replied(arrays(), {"num-examples": 3.0, "train_loss": 0.5, "many": [1, 2]}))
    assert update.client == 5
    assert update.num_examples == 3
    assert update.metrics == {"train_loss": 0.5}
    assert list(update.delta) == list(SENT)
    for name, start in SENT.items():
        assert torch.equal(update.delta[name], (start + 1).double() - start.double()) or (
            torch.allclose(update.delta[name], torch.ones(()))
        )


def test_names_in_another_order_are_the_same_update():
    backwards = ArrayRecord({name: SENT[name] for name in reversed(list(SENT))})
    assert list(read(replied(backwards)).delta) == list(SENT)


def test_whole_numbers_do_not_wrap_around():
    sent = {"x": torch.tensor([200], dtype=torch.uint8), "flag": torch.tensor([True])}
    got = {"x": torch.tensor([100], dtype=torch.uint8), "flag": torch.tensor([False])}
    update = checks.read_update(replied(ArrayRecord(got)), 0, messages.encode(sent))
    assert update.delta["x"].tolist() == [-100.0]
    assert update.delta["flag"].tolist() == [-1.0]


def test_an_infinity_that_was_sent_may_come_back():
    sent = {"mask": torch.tensor([0.0, -torch.inf])}
    back = {"mask": torch.tensor([1.0, -torch.inf])}
    update = checks.read_update(replied(ArrayRecord(back)), 0, messages.encode(sent))
    assert update.delta["mask"].tolist() == [1.0, 0.0]
    moved = {"mask": torch.tensor([-torch.inf, 0.0])}
    with pytest.raises(ClientFailure, match="NaN or Inf"):
        checks.read_update(replied(ArrayRecord(moved)), 0, messages.encode(sent))


def test_large_finite_numbers_are_no_infinity():
    sent = {"x": torch.zeros(4)}
    large = {"x": torch.full((4,), 3e38)}  # their sum overflows
    update = checks.read_update(replied(ArrayRecord(large)), 0, messages.encode(sent))
    assert torch.equal(update.delta["x"], large["x"])
    with pytest.raises(ClientFailure, match="NaN or Inf"):  # and so does a difference
        checks.read_update(replied(ArrayRecord({"x": -large["x"]})), 0, messages.encode(large))


def other(shape=(3, 2), dtype=torch.float32, fill=1.0):
    return torch.full(shape, fill, dtype=dtype)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (lambda: replied(arrays(w=None)), "names differ from those sent: w"),
        (lambda: replied(arrays(extra=other())), "names differ from those sent: extra"),
        (lambda: replied(ArrayRecord()), "names differ"),
        (lambda: replied(arrays(w=other((2, 3)))), r"w is torch.float32 \(2, 3\), expected"),
        (lambda: replied(arrays(w=other((6,)))), "expected torch.float32"),
        (lambda: replied(arrays(w=other((1, 2)))), "expected torch.float32"),
        (lambda: replied(arrays(w=other(dtype=torch.float64))), "w is torch.float64"),
        (lambda: replied(arrays(w=other(dtype=torch.int32))), "w is torch.int32"),
        (lambda: replied(arrays(w=other(fill=torch.nan))), "w holds NaN or Inf"),
        (lambda: replied(arrays(b=other((4,), fill=torch.inf))), "b holds NaN or Inf"),
        (lambda: replied(arrays(w=Array("float32", (3, 2), "numpy.ndarray", b"x"))), "decoded"),
        (lambda: replied(None), "expected one ArrayRecord in the reply, got 0"),
        (lambda: replied(arrays(), more=arrays()), "expected one ArrayRecord in the reply, got 2"),
        (lambda: replied(arrays(), more=MetricRecord()), "expected one MetricRecord"),
        (lambda: Message(RecordDict({"arrays": arrays()}), reply_to=asked()), "one MetricRecord"),
        (lambda: Message(RecordDict(), reply_to=asked()), "expected one ArrayRecord"),
        (lambda: Message(Error(2, "ValueError: no data"), reply_to=asked()), "ValueError: no data"),
        (lambda: Message(Error(8), reply_to=asked()), "error code 8"),
        (lambda: Message(Error(8, "  \n "), reply_to=asked()), "error code 8"),
        (lambda: replied(arrays(), {"num-examples": 3, "train_loss": float("nan")}), "train_loss"),
        (lambda: replied(arrays(), {"num-examples": 3, "train_loss": float("inf")}), "train_loss"),
        (lambda: replied(arrays(), {"num-examples": 3, "train_loss": 10**400}), "train_loss"),
    ],
)
def test_a_malformed_reply_is_refused_with_the_reason(reply, expected):
    import re

    assert re.search(expected, reason(reply()))


@pytest.mark.parametrize(
    "count", [0, -1, -0.0, 0.5, 2.5, 2**63, 2**53 + 1, 10**400, float("nan"), float("inf"), [3], []]
)
def test_num_examples_must_be_a_count(count):
    assert (
        "num-examples must be a whole number" in reason(replied(arrays(), {"num-examples": count}))
        or count == 10**400
    )


def test_a_reply_without_num_examples_is_refused():
    assert "got None" in reason(replied(arrays(), {"loss": 1.0}))


def test_num_examples_that_is_text_is_refused():
    record = MetricRecord()
    record.__dict__["_data"]["num-examples"] = "many"  # past Flower's own check
    reply = replied(arrays())
    reply.content["metrics"] = record
    assert "got 'many'" in reason(reply)


def test_an_error_is_told_by_its_last_line_in_black_and_white():
    text = "\x1b[36mray::run()\x1b[39m\n  File x, line 1\n\x1b[31mValueError: no data\x1b[0m\n"
    assert reason(Message(Error(2, text), reply_to=asked())) == "ValueError: no data"
    assert len(reason(Message(Error(2, "x" * 10_000), reply_to=asked()))) <= 500


def test_a_message_with_neither_content_nor_error_is_refused():
    reply = replied(arrays())
    reply.content = None
    assert reason(reply)


@pytest.mark.parametrize(
    ("basis", "record", "fits"),
    [
        ("", None, True),
        ("abc", {"basis": "abc"}, True),
        ("abc", {"basis": "abd"}, False),
        ("abc", {}, False),
        ("abc", None, False),
        ("", {"basis": "abc"}, False),
    ],
)
def test_the_factors_must_be_those_of_the_server(basis, record, fits):
    records = {} if record is None else {"reply": ConfigRecord(record)}
    reply = replied(arrays(), **records)
    if fits:
        assert read(reply, basis=basis).num_examples == 3
    else:
        assert "other frozen factors" in reason(reply, basis=basis)


@pytest.mark.parametrize("size", [0, 5, 7])
def test_a_packed_vector_of_another_size_is_refused(size):
    layout = Layout({"w": torch.Size([3, 2])}, torch.float32)
    sent = messages.encode_flat(torch.zeros(6))
    good = checks.read_update(replied(messages.encode_flat(torch.arange(6.0))), 0, sent, layout)
    assert torch.equal(good.delta["w"], torch.arange(6.0).view(3, 2))
    with pytest.raises(ClientFailure, match="packed is"):
        checks.read_update(replied(messages.encode_flat(torch.zeros(size))), 0, sent, layout)


def test_arrays_asked_for_come_in_the_order_asked_for():
    reply = replied(messages.encode({"b": tensor((4,)), "a": tensor((2, 3))}))
    assert list(checks.read_arrays(reply, 0, {"a": (2, 3), "b": (4,)})) == ["a", "b"]
    for shapes in ({"a": (2, 3)}, {"a": (3, 2), "b": (4,)}, {"a": (2, 3), "b": (4,), "c": (1,)}):
        with pytest.raises(ClientFailure, match="not those asked for"):
            checks.read_arrays(reply, 0, shapes)
    infinite = replied(messages.encode({"a": torch.tensor([torch.inf, -torch.inf])}))
    with pytest.raises(ClientFailure, match="a holds NaN or Inf"):
        checks.read_arrays(infinite, 0, {"a": (2,)})


# ---- whatever comes

NAMES = st.sampled_from(["w", "b", "steps", "packed", "extra", ""])
BYTES = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=60).map(lambda tail: b"\x93NUMPY\x01\x00" + tail),
    st.binary(max_size=150).map(lambda header: b"\x93NUMPY\x01\x00\x76\x00" + header),
    st.builds(
        lambda good, at, byte: good[: at % len(good)] + bytes([byte]) + good[at % len(good) + 1 :],
        st.sampled_from([saved(tensor.numpy()) for tensor in SENT.values()]),
        st.integers(0, 300),
        st.integers(0, 255),
    ),
)
ARRAYS = st.one_of(
    st.builds(
        Array,
        dtype=st.sampled_from(["float32", "int64", "object", "<f4", ""]),
        shape=st.lists(st.integers(-1, 2**40), max_size=40).map(tuple)
        | st.sampled_from([(3, 2), (4,), ()]),
        stype=st.sampled_from(["numpy.ndarray", "numpy.ndarray", "torch"]),
        data=BYTES,
    ),
    st.builds(
        lambda s, d: Array(tensor(s, d).numpy()), st.sampled_from(SHAPES), st.sampled_from(DTYPES)
    ),
    st.sampled_from([Array(value.numpy()) for value in SENT.values()]),
)
SCALARS = st.one_of(
    st.integers(), st.floats(), st.lists(st.floats(), max_size=3), st.just(10**5000)
)
RECORDS = st.one_of(
    st.dictionaries(NAMES, ARRAYS, max_size=4),
    st.fixed_dictionaries({name: ARRAYS for name in SENT}),
).map(lambda values: _record(ArrayRecord(), values)) | st.dictionaries(
    st.sampled_from(["num-examples", "train_loss", "basis"]), SCALARS
).map(lambda values: _record(MetricRecord(), values))
CONTENTS = st.dictionaries(st.sampled_from(["arrays", "metrics", "reply", "x"]), RECORDS)


def _record(record, values):
    for name, value in values.items():
        record[name] = value
    return record


@settings(max_examples=400, deadline=None)
@given(CONTENTS)
def test_only_a_client_failure_comes_out_of_a_reply(content):
    reply = Message(RecordDict(dict(content)), reply_to=asked())
    messages.wire_bytes(reply.content)
    for read_reply in (
        lambda: read(reply),
        lambda: checks.read_arrays(reply, 0, {"w": (3, 2)}),
        lambda: checks.read_reply_metrics(reply, 0),
    ):
        try:
            got = read_reply()
        except ClientFailure as failure:
            assert failure.reason  # noqa: PT017
            continue
        if not isinstance(got, dict):
            assert {n: t.shape for n, t in got.delta.items()} == {
                n: t.shape for n, t in SENT.items()
            }
            assert all(bool(t.isfinite().all()) for t in got.delta.values())
            assert got.num_examples >= 1


# ---- replies that make their records when asked


def unmade(params=None, metrics=None, facts=None) -> messages.TensorReply:
    params = {name: t + t.new_ones(()) for name, t in SENT.items()} if params is None else params
    metrics = {"num-examples": 3, "train_loss": 0.5} if metrics is None else metrics
    return messages.TensorReply(asked(), params, metrics, facts or {})


def outcome(reply, **options):
    try:
        update = read(reply, **options)
    except ClientFailure as failure:
        return failure.reason
    delta = {name: value.tolist() for name, value in update.delta.items()}
    return update.client, delta, update.num_examples, update.metrics


NUMBERS = {name: st.sampled_from([3, 0, 0.5, float("nan")]) for name in ("num-examples", "loss")}


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={n: st.sampled_from(list(SENT.values())) for n in SENT}),
    st.fixed_dictionaries({}, optional=NUMBERS),
    st.sampled_from([{}, {"basis": ""}, {"basis": "abc"}]),
)
def test_a_reply_is_judged_alike_whether_or_not_its_records_are_made(params, metrics, facts):
    for options in ({}, {"basis": "abc"}):
        reply = unmade(params, metrics, facts)
        size, before = messages.reply_bytes(reply), outcome(reply, **options)
        assert reply.held is not None
        made = Message(reply.content, reply_to=asked())
        assert reply.held is None
        assert outcome(reply, **options) == outcome(made, **options) == before
        assert messages.reply_bytes(reply) == messages.wire_bytes(made.content) == size


def test_an_unmade_reply_of_good_numbers_is_used():
    update = read(unmade(facts={"basis": "abc"}), basis="abc")
    assert (update.num_examples, update.metrics) == (3, {"train_loss": 0.5})
    for name, delta in update.delta.items():
        assert torch.allclose(delta, torch.ones_like(delta)), name
    assert "w holds NaN" in reason(unmade(SENT | {"w": other(fill=torch.nan)}))


def test_a_packed_reply_is_read_by_the_layout_and_a_coded_one_by_its_codec():
    layout = Layout({"w": torch.Size([3, 2])}, torch.float32)
    sent = messages.encode_flat(torch.zeros(6))
    packed = unmade({"packed": torch.arange(6.0)})
    update = checks.read_update(packed, 5, sent, layout)
    assert torch.equal(update.delta["w"], torch.arange(6.0).view(3, 2))
    coded = unmade({"half": torch.ones(3)})
    read_by = {"decode_reply": lambda arrays: {"w": 2 * arrays["half"]}}
    assert torch.equal(
        checks.read_update(coded, 5, sent, **read_by).delta["w"], torch.full((3,), 2.0)
    )
    assert packed.held is not None
    assert coded.held is not None


def test_what_was_spent_is_read_from_a_reply_that_makes_no_records():
    reply = unmade(facts={"spent": [1.0, 0.5, 3.0]})
    assert [(r.noise_multiplier, r.sample_rate, r.steps) for r in checks.read_spent(reply, 5)] == [
        (1.0, 0.5, 3)
    ]
    assert reply.held is not None
    with pytest.raises(ClientFailure, match="says nothing"):
        checks.read_spent(unmade(), 5)


@pytest.mark.parametrize("value", [3, np.ones(3), None])
def test_a_reply_holds_tensors_or_is_not_made(value):
    with pytest.raises(TypeError, match="a reply holds tensors"):
        unmade({"w": value})


def test_whoever_changes_what_a_reply_holds_is_heard():
    reply = unmade()
    assert reply.content is reply.content
    reply.content["metrics"] = MetricRecord({"num-examples": 8})
    assert read(reply).num_examples == 8
    changed = copy(unmade())
    changed.content = RecordDict()
    assert "expected one ArrayRecord" in reason(changed)


def test_what_leaves_the_process_is_a_message_of_flowers_own_class():
    reply = unmade(facts={"basis": "abc"})
    left = reply.plain(asked())
    assert type(left) is Message
    assert left.content == reply.content
    assert left.metadata.src_node_id == reply.metadata.src_node_id == 2
    assert set(left.content) == {"arrays", "metrics", "reply"}


# ---- bytes


def really(content: RecordDict) -> int:
    return sum(len(o.deflate()) for o in get_all_nested_objects(content).values())


@pytest.mark.parametrize("count", [1, 3, 60])
@pytest.mark.parametrize("numbers", [20_000, 300_000])
@pytest.mark.parametrize("make", [messages.encode, ArrayRecord])
def test_bytes_are_those_that_flower_serialises(make, numbers, count):
    params = {f"layer.{i}.weight": tensor((numbers // count,), seed=i) for i in range(count)}
    content = RecordDict({"arrays": make(params), "metrics": MetricRecord({"num-examples": 3})})
    content["config"] = ConfigRecord({"server-round": 1, "basis": "0" * 64, "list": ["a", "b"]})
    assert really(content) > 20_000
    assert messages.wire_bytes(content) == pytest.approx(really(content), rel=0.02)


def test_one_packed_vector_costs_its_numbers_and_at_most_5_per_cent_framing():
    """Fed-SB: 4 (sum r^2 + head) bytes up, whatever the number of layers."""
    params = {f"{i}.R.weight": tensor((16, 16)) for i in range(24)} | {"head": tensor((64, 3))}
    numbers = 24 * 16 * 16 + 64 * 3
    content = RecordDict({"arrays": messages.encode(params, Layout.of(params))})
    content["metrics"] = MetricRecord({"num-examples": 3, "train_loss": 0.5})
    content["reply"] = ConfigRecord({"basis": "0" * 64})
    assert 4 * numbers > 20_000
    for size in (messages.wire_bytes(content), really(content)):
        assert 4 * numbers < size <= 1.05 * 4 * numbers
