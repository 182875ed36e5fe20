"""How far apart artifacts with integers of different runtimes are, in one line."""

from __future__ import annotations

from penjing import records
from penjing.report import comparison, numbers


def line(record: records.Record) -> str:
    """The pair that differs most, with its bound; "" where fewer than two runtimes have integers.

    >>> row = records.ParityRow(output="y", snr_db=31.4, largest=0.1, limit_db=24.2)
    >>> pair = records.PairParity(first="litert-int8", second="openvino-int8", agreement=0.995, rows=(row,))
    >>> words(pair, row, 3)
    'litert-int8 and openvino-int8 differ most of 3 pairs: 31.4 dB, at least 24.2 dB are stated, 99.5 % agree'
    """
    pair = records.furthest(record.pairs)
    if pair is None or pair.worst is None:
        return ""
    return f"INT8 across runtimes: {words(pair, pair.worst, len(record.pairs))}"


def words(pair: records.PairParity, row: records.ParityRow, count: int) -> str:
    """What a pair and its worst row come to, the one that differs most of so many."""
    stated = ""
    if row.limit_db is not None:
        stated = f", at least {numbers.figure(row.limit_db, 'dB')} are stated"
    if row.limit_equal is not None:
        stated = f", at least {numbers.share(row.limit_equal)} are stated"
    figure = numbers.figure(row.snr_db, "dB") if row.equal is None else f"{numbers.share(row.equal)} equal"
    place = f" in {row.place}" if len({r.place for r in pair.rows}) > 1 else ""
    most = f"differ most of {comparison.plural(count, 'pair')}" if count > 1 else "differ"
    agree = f", {numbers.share(pair.agreement)} agree" if pair.agreement is not None else ""
    return f"{pair.first} and {pair.second} {most}: {row.fault or figure}{place}{stated}{agree}"
