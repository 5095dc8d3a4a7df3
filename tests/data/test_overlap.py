"""What training and evaluation share, found and counted."""

import numpy as np
import pytest

from subquad.core.errors import DataError
from subquad.data import Source, check_overlap
from subquad.data.overlap import LENGTH


def words(seed, n):
    return [f"w{i}" for i in np.random.default_rng(seed).integers(10**6, size=n)]


def source(name, *documents):
    return Source(name, lambda: iter(documents))


def test_overlap_is_counted_without_case_and_punctuation():
    seen, unseen = words(0, 60), words(1, 40)
    held = " ".join(seen[20:40]).upper().replace(" ", ",\n ") + "! " + " ".join(unseen)
    books = source("books", " ".join(words(2, 500)), " ".join(words(3, 50) + seen + words(4, 50)))
    other = source("other", " ".join(words(5, 5000)))
    said = [{"role": "user", "content": " ".join(unseen[:6])}, {"role": "a", "content": " ".join(unseen[6:13])}]
    talk = source("talk", said)
    every = check_overlap([other, talk, books], {"clean": " ".join(words(6, 100)), "leaked": held})
    assert len(every) == 6 and all(o.whole for o in every)
    assert {o.source: o.chars for o in every}["talk"] == len("\n".join(turn["content"] for turn in said))
    found = [o for o in every if o.found]
    assert [(o.source, o.text, o.grams, o.found) for o in found] == [
        ("books", "leaked", 60 - LENGTH + 1, 20 - LENGTH + 1),
        ("talk", "leaked", 60 - LENGTH + 1, 1),
    ]
    assert found[0].example == " ".join(seen[20:33])
    assert found[0].share == 8 / 48
    told = f"leaked stands in the training data books: 8 of 48 13-grams (16.67%) in all {found[0].chars:,} characters"
    assert str(found[0]) == f"{told}, e.g. {' '.join(seen[20:33])!r}"


def test_no_gram_goes_across_documents_and_order_counts():
    text = words(0, LENGTH)
    torn = source("torn", " ".join(text[:7]), " ".join(text[7:]), " ".join(text[::-1]), " ".join(text[1:] + text[:1]))
    for one in (torn, source("none")):
        (found,) = check_overlap([one], {"e": " ".join(text)})
        assert (found.grams, found.found, found.example) == (1, 0, "")
    assert check_overlap([torn], {}) == []


def test_a_find_in_any_batch_of_documents(monkeypatch):
    monkeypatch.setattr("subquad.data.overlap._MANY_CHARS", 100)
    text = words(0, 200)
    documents = [" ".join(words(i, 30)) for i in range(1, 9)]
    (found,) = check_overlap([source("s", *documents, " ".join(text))], {"e": " ".join(text)})
    assert found.share == 1


def test_a_source_that_never_ends_is_read_up_to_a_bound():
    text, read = " ".join(words(0, 50)), []

    def endless():
        while True:
            read.append(f"{len(read):99}")
            yield text if len(read) == 5 else read[-1]

    for chars, found in ((4 * 99, 0), (4 * 99 + 1, 38)):
        read.clear()
        (one,) = check_overlap([Source("s", endless)], {"e": text}, chars=chars)
        assert (one.found, one.whole) == (found, False)
        assert one.chars == 4 * 99 + (len(text) if found else 0)
        assert one.figure.endswith(f"in the first {one.chars:,} characters")


def test_scripts_without_spaces_count_by_character():
    text = "".join(chr(0x4E00 + int(i)) for i in np.random.default_rng(0).integers(5000, size=40))
    (found,) = check_overlap([source("s", f"前{text[5:25]}後")], {"e": text})
    assert (found.grams, found.found) == (40 - LENGTH + 1, 20 - LENGTH + 1)


def test_a_text_too_short():
    with pytest.raises(DataError, match="tiny: expected a text of at least 13 words"):
        check_overlap([], {"tiny": "a b c"})
