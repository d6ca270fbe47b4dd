"""Series: reading tables, padding, splits, units; what is malformed is one clear error that names row and column."""

import math
from typing import Any

import pytest
import torch

from pfode.errors import FileError, UsageError
from pfode.models.series import Scale, Series, read, read_ts

NAN = math.nan
TABLE = """id,time,channel,value,label
a,0.0,heart,60,well
a,1.0,heart,62,well
b,0.5,heart,80,ill
a,1.0,oxygen,98,well
b,0.25,oxygen,,ill
"""


def numbers(count=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    t = torch.rand(count, 9, generator=draw).sort(1).values * 10 + 5
    x = torch.randn(count, 9, 2, generator=draw) * 3 + 7
    lengths = torch.randint(2, 10, (count, 1), generator=draw)
    t = torch.where(torch.arange(9) < lengths, t, NAN)
    x = torch.where(torch.isnan(t)[..., None] | (torch.rand(x.shape, generator=draw) < 0.2), NAN, x)
    return Series(t, x, torch.arange(count) % 3, classes=("a", "b", "c"))


def test_a_long_table_is_series(tmp_path):
    (tmp_path / "long.csv").write_text(TABLE)
    data = read(tmp_path / "long.csv")
    assert (data.ids, data.channels, data.classes) == (("a", "b"), ("heart", "oxygen"), ("ill", "well"))
    torch.testing.assert_close(data.t, torch.tensor([[0.0, 1.0], [0.25, 0.5]]))
    expected = torch.tensor([[[60.0, NAN], [62.0, 98.0]], [[NAN, NAN], [80.0, NAN]]])
    torch.testing.assert_close(data.x, expected, equal_nan=True)
    assert data.label is not None
    assert data.label.tolist() == [1, 0]


class Frame:
    """As pandas, Polars and PyArrow have columns."""

    def __init__(self, columns):
        self.columns, self._columns = list(columns), columns

    def __getitem__(self, name):
        return self._columns[name]


def test_columns_in_memory_are_the_same_as_a_file(tmp_path):
    rows = [line.split(",") for line in TABLE.splitlines()]
    columns: dict[str, Any] = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    columns["value"] = [float(v) if v else None for v in columns["value"]]
    (tmp_path / "long.csv").write_text(TABLE)
    expected = read(tmp_path / "long.csv")
    for table in (columns, Frame(columns), {**columns, "time": torch.tensor([float(t) for t in columns["time"]])}):
        found = read(table)
        torch.testing.assert_close(found.x, expected.x, equal_nan=True)
        assert found.ids == expected.ids
    one = read(
        {"who": [1, 1, 2], "time": [0, 1, 0], "value": [1.0, 2.0, 3.0], "y": [0.5, 0.5, 1.0]}, id="who", label="y"
    )
    assert one.x.shape == (2, 2, 1)
    assert one.label is not None
    assert one.label.tolist() == [0.5, 1.0]
    torch.testing.assert_close(one.t, torch.tensor([[0.0, 1.0], [0.0, NAN]]), equal_nan=True)


def test_classes_that_are_numbers_are_in_their_order():
    table = {"id": list("abcd"), "time": [0] * 4, "value": [1.0] * 4, "label": ["10", "9", "2", "9"]}
    data = read(table)
    assert data.classes == ("2", "9", "10")
    assert data.label is not None
    assert data.label.tolist() == [2, 1, 0, 1]


def test_ts_files():
    text = b"# comment\n@problemName x\n@timeStamps false\n@classLabel true 1 2\n@data\n1,2,3:4,?,6:2\n5:6:1\n"
    data = read_ts(text)
    assert data.x.shape == (2, 3, 2)
    assert data.classes == ("1", "2")
    torch.testing.assert_close(data.x[0, :, 1], torch.tensor([4.0, NAN, 6.0]), equal_nan=True)
    torch.testing.assert_close(data.t[1], torch.tensor([0.0, NAN, NAN]), equal_nan=True)


def test_a_split_is_keyed_by_seed_and_id():
    data = numbers(200)
    parts = data.split([0.6, 0.2, 0.2], seed=3)
    assert sorted(name for part in parts for name in part.ids) == sorted(data.ids)
    assert abs(len(parts[0]) - 120) < 25
    fewer = data[50:].split([0.6, 0.2, 0.2], seed=3)
    assert set(fewer[1].ids) <= set(parts[1].ids)
    assert set(data.split([0.6, 0.4], seed=4)[0].ids) != set(data.split([0.6, 0.4], seed=5)[0].ids)
    name = parts[0].ids[4]
    torch.testing.assert_close(parts[0].x[4, :2], data.x[data.ids.index(name), :2], equal_nan=True)


def test_dropping_times_keeps_the_first_and_at_least_two():
    data = numbers()
    for share in (0.3, 0.7, 1.0):
        less = data.dropped(share, seed=1)
        assert torch.equal(less.t[:, 0], data.t[:, 0])
        expected = torch.maximum((data.lengths * (1 - share)).round(), torch.tensor(2.0)).minimum(data.lengths.float())
        assert torch.equal(less.lengths.float(), expected)
        alone = data[[7]].dropped(share, seed=1)
        torch.testing.assert_close(alone.t[0], less.t[7, : alone.t.shape[1]], equal_nan=True)
    torch.testing.assert_close(data.dropped(0.0).x, data.x, equal_nan=True)


def test_units_come_from_the_part_they_are_measured_on():
    data = numbers()
    train, test = data.split([0.7, 0.3], seed=0)
    scale = Scale.of(train)
    scaled = scale.apply(train)
    seen = scaled.observed
    for c in range(2):
        values = scaled.x[..., c][seen[..., c]]
        torch.testing.assert_close(values.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(unbiased=False), torch.tensor(1.0))
    times = scaled.t[~torch.isnan(scaled.t)]
    torch.testing.assert_close(torch.stack([times.min(), times.max()]), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(scale.values(scale.apply(test).x), test.x, equal_nan=True)
    torch.testing.assert_close(scale.times(scale.apply(test).t), test.t, equal_nan=True)
    constant = Series(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, 1))
    assert torch.equal(Scale.of(constant).apply(constant).x, torch.zeros(1, 2, 1))


def test_some_of_the_series_and_what_they_were_until_a_time():
    data = numbers()
    some = data[[3, 5]]
    assert some.ids == ("3", "5")
    assert some.t.shape[1] == int(data.lengths[[3, 5]].max())
    past = data.until(8.0)
    assert bool((past.t[~torch.isnan(past.t)] <= 8.0).all())
    assert int(past.lengths.sum()) == int((data.t <= 8.0).sum())
    assert len(data[:0]) == 0


def cell(column, row, value):
    lines = [line.split(",") for line in TABLE.splitlines()]
    lines[row][lines[0].index(column)] = value
    return "\n".join(",".join(line) for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'id'; there are"),
        ("id,time,value\n", "no rows"),
        ("name,time,value\na,0,1\n", r"no column 'id'; there are \['name', 'time', 'value'\]\nhint: id="),
        ("id,time\na,0\n", "no column 'value'"),
        ("id,id,time,value\na,a,0,1\n", "a column's name comes twice"),
        ("id,time,value\na,0\n", "row 1: 2 entries for 3 columns"),
        ("id,time,value\na,0,1,2\n", "row 1: 4 entries for 3 columns"),
        (cell("time", 2, "noon"), "row 2, column 'time': 'noon' is no finite number"),
        (cell("time", 3, ""), "row 3, column 'time': '' is no finite number"),
        (cell("time", 3, "nan"), "row 3, column 'time': 'nan' is no finite number"),
        (cell("time", 1, "inf"), "row 1, column 'time': 'inf'"),
        (cell("value", 4, "high"), "row 4, column 'value': 'high' is no finite number"),
        (cell("value", 4, "-inf"), "row 4, column 'value': '-inf'"),
        (cell("value", 4, "1e999"), "row 4, column 'value': '1e999'"),
        (cell("id", 2, ""), "row 2, column 'id': no id"),
        (cell("label", 2, ""), "row 2, column 'label': series 'a' has no label"),
        (cell("label", 2, "ill"), "row 2, column 'label': 'ill', and 'well' before, of series 'a'"),
        (cell("time", 2, "0.0"), "row 2: series 'a' has a value of 'heart' at 0, in row 1"),
        (cell("time", 2, "1e-50"), "the times 0.0 and 1e-50 are one in torch.float32"),
        ('id,time,value\na,0,"1\n', "line 2: unexpected end of data"),
    ],
)
def test_malformed_tables_are_one_clear_error(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(FileError, match=words) as caught:
        read(tmp_path / "t.csv")
    assert "t.csv" in str(caught.value)


COLUMNS = {"id": ["a", "a"], "time": [0.0, 1.0], "value": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "need a CSV file or columns by name, got NoneType"),
        (3, "need a CSV file or columns by name, got int"),
        (COLUMNS | {"time": [0.0]}, "columns of different lengths"),
        (COLUMNS | {"time": [0.0, None]}, "row 2, column 'time': None is no finite number"),
        (COLUMNS | {"time": [0.0, True]}, "row 2, column 'time': True is no finite number"),
        (COLUMNS | {"value": [[], 1.0]}, r"row 1, column 'value': \[\] is no finite number"),
        (COLUMNS | {"id": ["a", None]}, "row 2, column 'id': no id"),
        (COLUMNS | {"time": [0.0, 10**400]}, "row 2, column 'time'"),
        (COLUMNS | {"label": ["x", NAN]}, "row 2, column 'label': series 'a' has no label"),
        ({}, "no column 'id'"),
    ],
)
def test_malformed_columns_are_one_clear_error(table, words):
    with pytest.raises(UsageError, match=words):
        read(table)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "no line @data"),
        (b"1,2,3", "no line @data"),
        (b"@data\n", "no series after @data"),
        (b"@timeStamps true\n@data\n(0,1)", "it has time stamps"),
        (b"@classLabel true a\n@data\n1,2:3,4:a\n1,2:a", "row 2: 1 channels, not 2"),
        (b"@classLabel true a\n@data\na", "row 1: 0 channels, not one or more"),
        (b"@data\n1,x,3", "row 1, channel 0: 'x' is no finite number"),
        (b"@data\n1,2:3,inf", "row 1, channel 1: 'inf' is no finite number"),
        (b"\xff\xfe\x00@data", "no line @data"),
    ],
)
def test_malformed_ts_files_are_one_clear_error(raw, words):
    with pytest.raises(FileError, match=words):
        read_ts(raw)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"id,time,value\n\xff,0,1\n")
    for path, words in (
        (tmp_path / "none.csv", "none.csv"),
        (tmp_path, "folder|directory"),
        (tmp_path / "b.csv", "UTF-8"),
    ):
        with pytest.raises(FileError, match=words):
            read(path)
        if words != "UTF-8":
            with pytest.raises(FileError, match=words):
                read_ts(path)


T2, X2 = torch.zeros(2, 3), torch.zeros(2, 3, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Series(T2, X2[:, :2]), "need real t of shape"),
        (lambda: Series(T2[0], X2), "need real t of shape"),
        (lambda: Series(T2.long(), X2), "need real t of shape"),
        (lambda: Series(T2, X2, torch.zeros(3)), r"2 series and labels of shape \(3,\)"),
        (lambda: Series(T2, X2, ids=("a",)), "2 ids, and 1 names"),
        (lambda: Series(T2, X2, channels=("a", "b")), "1 channels, and 2 names"),
        (lambda: numbers().split([0.5, 0.4]), "need numbers that make 1"),
        (lambda: numbers().split([1.5, -0.5]), "shares: need a number"),
        (lambda: numbers().dropped(1.5), "share: need a number"),
        (lambda: Scale.of(numbers()[:0]), "no series to measure"),
    ],
)
def test_malformed_series_are_one_clear_error(make, words):
    with pytest.raises(UsageError, match=words):
        make()
