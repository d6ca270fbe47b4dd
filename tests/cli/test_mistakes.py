"""What people type by mistake, or as other programs have it: one line, the right exit code, the way it is here."""

import pytest

MISTAKES = [
    ("sample 20", 2, "unexpected extra argument"),
    ("sample -n 4", 2, "did you mean '--n'?"),
    ("sample --cfg 3", 2, "here it is called --guidance"),
    ("sample --scheduler ddim", 2, "here it is called --sampler"),
    ("sample --num-inference-steps 20", 2, "here it is called --steps"),
    ("sample --num_images 20", 2, "here it is called --n"),
    ("sample --prompt cat", 2, "a text-to-image pipeline does"),
    ("train --learning-rate 1", 2, "here it is called --lr"),
    ("train --epochs 3", 2, "here it is called --steps"),
    ("help", 2, "`pfode --help`"),
    ("version", 2, "`pfode --version`"),
    ("generate", 2, "`pfode sample`"),
    ("samples", 2, "did you mean 'samplers'"),
    ("sample --sampler dpmpp_2m_karras --grid cosine", 2, "--grid karras"),
    ("sample --sampler dpmpp_2mm_karras", 2, "did you mean 'dpm++2m'"),
    ("bench --sampler dpmpp_2m_karras --model gaussian-2", 2, "--sampler dpm++2m"),
    ("sample --model digit", 2, "did you mean 'digits'?"),
    ("sample --model digits.safetensors", 3, "no such file"),
    ("sample --label seven", 2, "unknown label 'seven'"),
    ("sample --out sheet.tiff", 2, "--out sheet.png"),
    ("sample --device cuda:7", 4, "--device cpu"),
    ("sample --dtype half", 2, "'fp16'"),
    ("sample --nfe 1 --sampler rk4 --final", 2, "no such option --final"),
    ("sample --init", 2, "requires an argument"),
    ("info nothing", 2, "unknown model 'nothing'"),
    ("samplers unipc33", 2, "did you mean 'unipc3'"),
    ("train --data nothing", 2, "no such file or data set"),
    ("train --process DDPM", 2, "'vp'"),
    ("fit --nfe 4-8", 2, "--nfe 4,6,8"),
    ("fit --nfe 0 --model digits", 2, "--nfe 1"),
    ("bench --sampler huen --model gaussian-2", 2, "did you mean 'heun'?"),
    ("convert digits out.pt", 2, "out.safetensors"),
    ("convert digits", 2, "Missing argument"),
]


@pytest.mark.parametrize(("words", "code", "text"), MISTAKES, ids=[words for words, _, _ in MISTAKES])
def test_natural_mistakes(cli, tmp_path, words, code, text):
    run = cli(*words.split())
    assert run.code == code, run.err
    assert text in run.err
    assert len(run.err.splitlines()) <= 2
    assert max(map(len, run.err.splitlines())) < 260
    assert not run.out
    assert not list(tmp_path.rglob("*.png"))
