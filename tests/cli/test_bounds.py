"""Numbers beyond what can be made: refused at once, in one line that names the option."""

import pytest

HUGE = "1" + "0" * 40
CALLS = [
    (f"sample --n {HUGE}", "--n"),
    (f"sample --n {'9' * 5000}", "--n"),
    (f"sample --seed {HUGE}", "--seed"),
    (f"sample --seeds 0-{HUGE}", "--seeds"),
    ("sample --seeds 0-18446744073709551615", "more than"),
    (f"sample --steps {HUGE}", "steps: need an integer from 1 to 100000"),
    (f"sample --steps {HUGE} --sampler heun", "steps"),
    (f"sample --nfe {HUGE}", "nfe"),
    ("sample --steps 100001", "steps"),
    ("sample --eta 1e300 --sampler euler-a", "eta: need a number"),
    ("sample --set tau=1e300 --sampler sa-solver", "tau: need a number"),
    ("sample --afs 1e300", "its coefficients pass the largest number"),
    ("sample --guidance 1e300", "--guidance"),
    (f"sample --scale {HUGE}", "--scale"),
    ("sample --grid karras(1e308)", "karras: rho"),
    ("sample --steps 1e3", "'1e3' is not a valid"),
    (f"train --size {HUGE}", "--size"),
    (f"train --widths {HUGE}", "widths"),
    (f"fit --nfe {HUGE} --model digits", "nfe"),
    (f"fit --n {HUGE} --model digits", "n: need an integer"),
    (f"bench --n {HUGE} --model gaussian-2", "n: need an integer"),
    (f"bench --model gaussian-{HUGE}", "dimensions"),
    (f"bench --nfe {HUGE} --model gaussian-2", "evals"),
    (f"bench --teacher {HUGE} --model gaussian-2", "teacher"),
]


@pytest.mark.parametrize(("words", "text"), CALLS, ids=[words[:50] for words, _ in CALLS])
def test_numbers_beyond_what_can_be_made(cli, tmp_path, words, text):
    run = cli(*words.split())
    assert run.code == 2, run.err
    assert text in run.err
    assert len(run.err.splitlines()) <= 2
    assert not list(tmp_path.rglob("*.png"))
