"""pfode sample --text: words set from letters; and the settings that a model's card recommends."""

import numpy as np
import pytest
from PIL import Image

import pfode
from pfode.cli.images import to_pixels
from pfode.cli.typeset import GAP, MARGIN, SPACE, page_of, set_word, spans
from pfode.scores import load, save

WORDS = ("sample", "--model", "digits", "--steps", 2)


def letter(left, right, ink=0, ground=255):
    picture = np.full((8, 8), ground, np.uint8)
    picture[2:6, left:right] = ink
    return picture


def test_a_word_is_cut_to_its_ink_and_keeps_its_rows():
    glyphs = np.stack([letter(1, 4), letter(3, 5)])
    ends = spans(glyphs)
    assert ends == [(1, 4), (3, 5)]
    word = set_word(glyphs, ends, [0, 1, None, 0])
    assert word.shape == (8, 2 * MARGIN + 3 + 2 + 3 + SPACE + 3 * GAP)
    assert (word[:2] == 255).all()
    assert (word[6:] == 255).all()
    assert np.flatnonzero(word[3] == 0).tolist()[:5] == [MARGIN + i for i in (0, 1, 2, 3 + GAP, 4 + GAP)]


def test_white_on_black_is_ink_too():
    glyphs = letter(2, 5, 255, 0)[None]
    assert spans(glyphs) == [(2, 5)]
    assert (set_word(glyphs, spans(glyphs), [0])[0] == 0).all()


def test_a_picture_without_ink_takes_some_room():
    (ends,) = spans(np.full((1, 32, 32, 3), 250, np.uint8))
    assert ends == (10, 22)


def test_words_of_other_widths_share_a_page():
    words = [np.full((8, width), 255, np.uint8) for width in (20, 30, 25)]
    page, padded = page_of(words)
    assert padded.shape == (3, 8, 30)
    assert page.shape == (16, 60)


def test_a_word_is_the_letters_of_its_seed(cli, tmp_path):
    done = cli(*WORDS, "--text", "7 17", "--seed", 5, "--n", 2, "--out", "w.png", "--scale", 1, "--json")
    assert done.code == 0, done.err
    assert done.json["n"] == 2
    glyphs = to_pixels(pfode.sample(load("digits"), seeds=[5, 5, 6, 6], steps=2, label=["7", "1"] * 2).x)
    words = [set_word(part, spans(part), [0, None, 1, 0]) for part in (glyphs[:2], glyphs[2:])]
    with Image.open(tmp_path / "w.png") as sheet:
        assert np.array_equal(np.asarray(sheet), page_of(words)[0])
    again = cli("sample", "--like", "w.png", "--out", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "w.png").read_bytes()
    assert "--text '7 17'" in cli("info", "w.png").out


def test_a_word_appears_from_noise(cli, tmp_path):
    done = cli(*WORDS, "--text", "42", "--trajectory", "w.gif", "--out", "w.png")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "w.gif") as film, Image.open(tmp_path / "w.png") as sheet:
        assert film.size == sheet.size
        assert getattr(film, "n_frames") == 3  # noqa: B009 (the last one is held)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--text", "7a"), "has no 'a'"),
        (("--text", ""), "1 to 200 letters"),
        (("--text", "   "), "1 to 200 letters"),
        (("--text", "7" * 201), "1 to 200 letters"),
        (("--text", "7", "--label", "3"), "exclude each other"),
        (("--text", "7", "--separate", "d"), "exclude each other"),
        (("--text", "7", "--init", "x.png"), "exclude each other"),
    ],
)
def test_texts_that_cannot_be_set(cli, words, said, tmp_path):
    done = cli(*WORDS, *words)
    assert (done.code, said in done.err) == (2, True), done.err
    assert not list(tmp_path.iterdir())


def test_what_a_card_recommends_is_the_default(cli, tmp_path):
    den = load("digits")
    save(den, tmp_path / "m.safetensors", card={"recommended": {"sampler": "ddim", "steps": 3, "guidance": 2.0}})
    words = ("sample", "--model", "m.safetensors", "--n", 2, "--out")

    def used(*more):
        done = cli(*words, "a.png", "--json", *more)
        assert done.code == 0, done.err
        options = done.json["settings"]["options"]
        return options["sampler"], options["steps"], options.get("guidance")

    assert used("--label", "3") == ("ddim", 3, 2.0)
    assert used("--label", "none") == ("ddim", 3, None)
    assert used("--label", "3", "--guidance", 1.5) == ("ddim", 3, 1.5)
    sampler, steps, guidance = used("--label", "3", "--steps", 2)
    assert (sampler != "ddim", steps, guidance) == (True, 2, 2.0)
    assert cli(*words, "b.png", "--sampler", "heun", "--label", "3", "--steps", 2).code == 0
    like = cli("sample", "--like", "b.png", "--out", "c.png", "--json").json["settings"]["options"]
    assert (like["sampler"], like["steps"]) == ("heun", 2)


def test_a_recommendation_that_cannot_be_is_the_files_fault(cli, tmp_path):
    for number, wrong in enumerate(({"sampler": 3.5}, {"steps": "many"}, {"guidance": "x"})):
        save(load("digits"), tmp_path / f"{number}.safetensors", card={"recommended": wrong})
        done = cli("sample", "--model", f"{number}.safetensors", "--n", 1, "--label", "3")
        assert (done.code, "recommended" in done.err) == (3, True), done.err


def test_python_sets_nothing_by_itself(tmp_path):
    save(load("digits"), tmp_path / "m.safetensors", card={"recommended": {"sampler": "ddim", "steps": 3}})
    assert pfode.sample(load(tmp_path / "m.safetensors"), n=1, label=0).nfe == pfode.defaults.STEPS
