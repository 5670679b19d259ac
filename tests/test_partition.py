import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.data import (
    IID,
    Bootstrap,
    Contiguous,
    Dataset,
    Digits,
    DirichletFedAU,
    DirichletFRL,
    Natural,
    TensorExamples,
    plot_partition,
    write_manifest,
)
from fedsys.data.tables import read_table
from fedsys.errors import DataError
from fedsys.seeds import numpy_generator

REAL = Path(__file__).parents[1].parent / "shared" / "data"
CONFIGS = Path(__file__).parents[1] / "configs" / "partition"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"real data sets are not at {REAL}")


def rows_of(labels, columns=None) -> Dataset:
    labels = torch.as_tensor(labels, dtype=torch.int64)
    examples = TensorExamples(torch.zeros(len(labels), 1), labels)
    classes = int(labels.max()) + 1
    names = [str(label) for label in range(classes)]
    return Dataset(
        train=examples,
        evaluation=examples,
        num_classes=classes,
        columns=columns or {},
        label_names=names,
    )


def all_rows(shards) -> list[list[int]]:
    return [shards.rows(client).tolist() for client in range(len(shards))]


@pytest.fixture(scope="module")
def digits():
    return Digits().load(None, 0, ())


EVERY = [
    IID(allow_empty=True),
    Contiguous(allow_empty=True),
    DirichletFedAU(alpha=0.3, allow_empty=True),
    DirichletFRL(alpha=0.3, allow_empty=True),
]
DRAWN = [*EVERY[:1], *EVERY[2:], Bootstrap(examples=5)]


def by_name(partition) -> str:
    return type(partition).__name__


@pytest.mark.parametrize("partition", EVERY, ids=by_name)
@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    num_clients=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_every_row_has_one_client(partition, labels, num_clients, seed):
    shards = partition.split(rows_of(labels), num_clients, seed)
    parts = all_rows(shards)
    assert len(parts) == len(shards) == num_clients
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    assert shards.sizes().tolist() == [len(part) for part in parts]
    assert [shards.size(client) for client in range(num_clients)] == shards.sizes().tolist()


@pytest.mark.parametrize("partition", DRAWN, ids=by_name)
def test_the_seed_decides(partition, digits):
    first, again, other = (all_rows(partition.split(digits, 12, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("partition", EVERY[:2], ids=by_name)
@given(total=st.integers(1, 200), num_clients=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_even_sizes_differ_by_at_most_one(partition, total, num_clients):
    sizes = partition.split(rows_of([0] * total), num_clients, 0).sizes()
    assert sizes.max() - sizes.min() <= 1


def test_contiguous_parts_are_those_of_the_formula():
    parts = all_rows(Contiguous().split(rows_of([0] * 11), 4, 0))
    assert parts == [list(range(i * 11 // 4, (i + 1) * 11 // 4)) for i in range(4)]


def test_iid_is_shuffled(digits):
    rows = IID().split(digits, 4, 0).rows(0)
    assert not torch.equal(rows.sort().values, torch.arange(len(rows)))


def class_counts(shards, dataset):
    parts = [dataset.train.labels[rows] for rows in map(shards.rows, range(len(shards)))]
    return [torch.bincount(part, minlength=10).tolist() for part in parts]


@pytest.mark.parametrize("alpha", [0.02, 0.1, 1.0, 50.0])
def test_dirichlet_fedau_is_the_loop_of_its_authors(alpha, digits):
    clients, seed = 23, 7
    labels = digits.train.labels.tolist()
    mixes = numpy_generator(seed, "partition").dirichlet([alpha] * 10, size=clients)
    expected = [[0] * 10 for _ in range(clients)]
    for c in range(10):
        members, start = labels.count(c), 0
        total, reached = sum(mix[c] for mix in mixes), 0.0
        for client in range(clients):
            reached += mixes[client][c]
            end = round(members * (reached / total))
            expected[client][c] = end - start
            start = end
    shards = DirichletFedAU(alpha=alpha, allow_empty=True).split(digits, clients, seed)
    assert class_counts(shards, digits) == expected


def test_dirichlet_frl_rounds_and_gives_the_rest_to_the_last(digits):
    clients, seed, alpha = 9, 3, 0.7
    labels = digits.train.labels.tolist()
    shares = numpy_generator(seed, "partition").dirichlet([alpha] * clients, size=10)
    expected = [[0] * 10 for _ in range(clients)]
    for c in range(10):
        members, start = labels.count(c), 0
        for client in range(clients - 1):
            end = min(members, start + round(members * shares[c][client]))
            expected[client][c] = end - start
            start = end
        expected[-1][c] = members - start
    shards = DirichletFRL(alpha=alpha).split(digits, clients, seed)
    assert class_counts(shards, digits) == expected


@pytest.mark.parametrize("kind", [DirichletFedAU, DirichletFRL])
def test_dirichlet_skews_labels_and_nothing_else(kind, digits):
    # Rows of one writer lie together in the file; a client's rows of a class may not.
    shards = kind(alpha=1.0, allow_empty=True).split(digits, 10, 0)
    labels, apart = digits.train.labels, []
    for client in range(10):
        rows = shards.rows(client)
        for c in range(10):
            own = rows[labels[rows] == c]
            place = torch.searchsorted((labels == c).nonzero().flatten(), own)
            apart += (place.diff() > 1).tolist()
    assert np.mean(apart) > 0.5


@pytest.mark.parametrize("kind", [DirichletFedAU, DirichletFRL])
def test_small_alpha_is_more_skewed(kind, digits):
    def largest_share(alpha):
        shards = kind(alpha=alpha, allow_empty=True).split(digits, 10, 0)
        counts = [torch.bincount(digits.train.labels[rows]) for rows in map(shards.rows, range(10))]
        return float(np.mean([float(c.max() / c.sum()) for c in counts if len(c)]))

    assert largest_share(0.05) > 0.5 > largest_share(100.0)


def test_a_class_that_no_client_drew_is_still_shared():
    # With so small an alpha nearly every mix is a single class, so most classes are drawn by none.
    shards = DirichletFedAU(alpha=1e-6, allow_empty=True).split(rows_of(range(8)), 2, 0)
    assert sorted(row for part in all_rows(shards) for row in part) == list(range(8))


@pytest.mark.parametrize("kind", [DirichletFedAU, DirichletFRL])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_is_positive(kind, alpha):
    with pytest.raises(ValueError, match=f"alpha is a concentration above 0, got {alpha}"):
        kind(alpha=alpha)


def test_dirichlet_needs_labels():
    unlabelled = TensorExamples(torch.zeros(4, 1), None)
    dataset = Dataset(train=unlabelled, evaluation=unlabelled)
    with pytest.raises(DataError, match="a Dirichlet partition needs labels and this data has"):
        DirichletFedAU(alpha=1.0).split(dataset, 2, 0)


@pytest.mark.parametrize("partition", [IID(), Contiguous()], ids=by_name)
def test_more_clients_than_rows_are_refused(partition):
    message = r"2 of 5 clients would hold none of the 3 training rows \(clients .*\): ask for fewer"
    with pytest.raises(DataError, match=message):
        partition.split(rows_of([0] * 3), 5, 0)


@pytest.mark.parametrize("kind", [DirichletFedAU, DirichletFRL])
def test_empty_clients_are_refused_with_a_way_out(kind):
    dataset = rows_of([0, 1] * 5)
    allowed = kind(alpha=0.05, allow_empty=True).split(dataset, 40, 0)
    empty = (allowed.sizes() == 0).nonzero().flatten().tolist()
    first = ", ".join(map(str, empty[:5]))
    message = rf"^{len(empty)} of 40 clients .*\(clients {first}, \.\.\.\).*alpha.*allow_empty=true"
    with pytest.raises(DataError, match=message):
        kind(alpha=0.05).split(dataset, 40, 0)


# Natural clients


def test_natural_clients_are_the_keys_by_name():
    columns = {"role": np.array(["b", "a", "c", "a", "b", "a"])}
    dataset = rows_of([0] * 6, columns)
    partition = Natural(column="role")
    assert partition.keep == ("role",)
    shards = partition.split(dataset, 3, 0)
    assert all_rows(shards) == [[1, 3, 5], [0, 4], [2]]
    assert [shards.name(client) for client in range(3)] == ["a", "b", "c"]


def test_the_largest_natural_clients_are_taken_and_ties_go_by_name():
    columns = {"role": np.array(["d", "c", "b", "b", "a"])}
    shards = Natural(column="role").split(rows_of([0] * 5, columns), 2, 0)
    assert [shards.name(client) for client in range(2)] == ["a", "b"]
    assert all_rows(shards) == [[4], [2, 3]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 12)), min_size=1, max_size=60))
def test_natural_clients_of_several_columns_are_a_dictionary_of_rows(keys):
    plays, roles = zip(*keys, strict=True)
    columns = {"play": np.array(plays), "role": np.array(roles)}
    expected: dict[tuple, list[int]] = {}
    for row, key in enumerate(keys):
        expected.setdefault(key, []).append(row)
    partition = Natural(column=["play", "role"])
    shards = partition.split(rows_of([0] * len(keys), columns), len(expected), 0)
    assert all_rows(shards) == [expected[key] for key in sorted(expected)]
    assert shards.name(0) == "{} / {}".format(*min(expected))


def test_too_few_natural_clients_are_refused():
    dataset = rows_of([0] * 3, {"role": np.array(["a", "b", "a"])})
    with pytest.raises(DataError, match=r"role has 2 distinct values .*too few for 3 clients"):
        Natural(column="role").split(dataset, 3, 0)
    with pytest.raises(DataError, match="has no column 'rule', only role; did you mean 'role'"):
        Natural(column="rule").split(dataset, 1, 0)


@real_data
def test_shakespeare_has_its_roles():
    table = read_table(str(REAL / "shakespeare" / "shakespeare_roles.tsv.gz"), ["play", "role"])
    columns = {name: table.keys(name) for name in ("play", "role")}
    dataset = rows_of([0] * len(table), columns)
    sizes = Natural(column=["play", "role"]).split(dataset, 1548, 0).sizes()
    assert int(sizes.sum()) == 97_488
    assert [int((sizes >= least).sum()) for least in (1, 2, 50)] == [1548, 1349, 446]


# Bootstrap


def test_a_million_clients_cost_nothing_until_asked(digits):
    shards = Bootstrap(examples=20).split(digits, 1_000_000, 0)
    assert len(shards) == 1_000_000
    assert shards.size(999_999) == 20
    assert shards.sizes().sum() == 20_000_000
    rows = shards.rows(999_999)
    assert torch.equal(rows, shards.rows(999_999))
    assert not torch.equal(rows, shards.rows(999_998))
    with pytest.raises(IndexError):
        shards.rows(1_000_000)


def test_bootstrap_draws_every_row_alike(digits):
    shards = Bootstrap(examples=200).split(digits, 400, 0)
    counts = torch.bincount(torch.cat([shards.rows(client) for client in range(400)]))
    expected = 80_000 / len(digits.train)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(digits.train) - 1
    assert len(counts) == len(digits.train)
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_bootstrap_draws_something():
    with pytest.raises(ValueError, match="examples counts rows and must be at least 1, got 0"):
        Bootstrap(examples=0)


# Manifest and picture


def test_the_manifest_tells_clients_apart(tmp_path, digits):
    path = tmp_path / "manifest.json"

    def clients(seed):
        write_manifest(path, IID().split(digits, 7, seed), digits, seed)
        return json.loads(path.read_text())["clients"]

    first, again, other = clients(0), clients(0), clients(1)
    assert first == again
    assert len({client["sha256"] for client in first + other}) == 14
    assert sum(client["examples"] for client in first) == len(digits.train)


def test_the_manifest_of_many_clients_is_a_summary_and_says_so(tmp_path, digits):
    path = tmp_path / "manifest.json"
    write_manifest(path, Bootstrap(examples=3).split(digits, 10_001, 0), digits, 0)
    content = json.loads(path.read_text())
    assert "clients" not in content
    assert content["note"] == "summary only: clients are listed up to 10000 of them"
    assert content["examples"] == {"total": 30_003, "smallest": 3, "mean": 3.0, "largest": 3}


@pytest.mark.parametrize("num_clients", [1, 30, 101, 20_000])
def test_pictures_are_drawn_at_every_size(num_clients, tmp_path, digits):
    pytest.importorskip("matplotlib")
    path = tmp_path / "partition.png"
    plot_partition(path, Bootstrap(examples=9).split(digits, num_clients, 0), digits)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_of_unlabelled_and_very_uneven_data(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = [1] * 120 + [5000]
    keys = np.repeat(np.arange(len(sizes)), sizes)
    examples = TensorExamples(torch.zeros(len(keys), 1), None)
    dataset = Dataset(train=examples, evaluation=examples, columns={"key": keys})
    for num_clients in (5, 121):
        shards = Natural(column="key").split(dataset, num_clients, 0)
        path = tmp_path / f"{num_clients}.png"
        plot_partition(path, shards, dataset)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("iid", IID),
        ("contiguous", Contiguous),
        ("dirichlet", DirichletFedAU),
        ("dirichlet_fedau", DirichletFedAU),
        ("dirichlet_frl", DirichletFRL),
        ("natural", Natural),
        ("bootstrap", Bootstrap),
    ],
)
def test_yaml_names_the_fields(name, kind):
    omegaconf = pytest.importorskip("omegaconf")
    plain = omegaconf.OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert plain.pop("_target_") == f"fedsys.data.{kind.__name__}"
    assert set(plain) == set(omegaconf.OmegaConf.structured(kind))
