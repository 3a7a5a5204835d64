import pytest

from lowmem.errors import LowmemError
from lowmem.sizes import GIB, MIB, format_size, parse_size, short_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8G", 8 * GIB),
        ("7.5GiB", int(7.5 * GIB)),
        ("512m", 512 * MIB),
        ("1048576", MIB),
        (" 2 gb ", 2 * GIB),
        (".5G", GIB // 2),
    ],
)
def test_sizes_as_people_write_them(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "eight", "-1G", "8X", "G", "0", "1e3G", "8 G B"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(LowmemError):
        parse_size(text)


def test_format_keeps_three_figures():
    assert format_size(8 * GIB) == "8.00 GiB"
    assert format_size(1536 * MIB) == "1.50 GiB"
    assert format_size(96.4 * MIB) == "96.4 MiB"
    assert format_size(100) == "100 B"
    assert format_size(-MIB) == "-1.00 MiB"


def test_short_sizes_can_be_typed_back():
    for text in ("8G", "3.5G", "512M", "1.25G"):
        assert short_size(parse_size(text)) == text
