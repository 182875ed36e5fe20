"""Ten spoken words in noise, by construction: the synthesizer espeak-ng says them in several accents and voices.

The voices of the test are not among those of the training. Networks see the logarithm of 40 mel bands, 84 frames.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

import penjing as pj
from examples import data

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029")
VOICES = {  # of espeak-ng, men and women
    "train": ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3"),
    "select": ("m7", "f5"),
    "test": ("m8", "f4", "croak"),
}
TIMES = 2  # a word is said by a voice, each at another pitch and speed
RATE = 11025  # samples a second, half of what espeak-ng gives
SAMPLES = 11008  # of a clip: 84 frames
WINDOW, HOP, BANDS = 384, 128, 40
MEAN, STD = -3.0, 3.0  # of the spectra, roughly


def clips(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Spoken words without noise: float32 (N, 11008) from -1 to 1, and their numbers; said once, then in the cache."""
    file = data.cache() / f"spoken-words-{part}-{len(ACCENTS)}-{TIMES}.npz"
    if not file.is_file():
        random = np.random.default_rng(0)
        said = list(itertools.product(range(len(WORDS)), ACCENTS, VOICES[part], range(TIMES)))
        sounds = [
            spoken(WORDS[word], f"{accent}+{voice}", int(random.integers(30, 70)), int(random.integers(130, 200)))
            for word, accent, voice, _ in said
        ]
        aside = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(aside, sounds=np.stack(sounds), words=np.array([word for word, *_ in said]))
        aside.replace(file)
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["sounds"].astype(np.float32) / 32768, arrays["words"]


def spoken(word: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """Let espeak-ng say a word: int16 (11008,), the loudest part in the middle."""
    program, variables = data.espeak()
    command = [*program, "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    answer = subprocess.run(command, capture_output=True, check=True, env={**os.environ, **variables}, timeout=60)
    sound = np.frombuffer(answer.stdout[44:], dtype="<i2")  # behind the header of the WAV file
    sound = sound[: len(sound) // 2 * 2].reshape(-1, 2).mean(axis=1)
    loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1][:SAMPLES]
    before = (SAMPLES - len(sound)) // 2
    return np.pad(sound, (before, SAMPLES - len(sound) - before)).astype(np.int16)


def noisy(sounds: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Shift each clip by up to a tenth of a second, and add noise of 0 to 20 dB below it, more of it in the bass."""
    shifts = random.integers(-RATE // 10, RATE // 10, len(sounds))
    moved = np.stack([np.roll(sound, shift) for sound, shift in zip(sounds, shifts, strict=True)])
    white = np.fft.rfft(random.normal(size=moved.shape))
    tilt = (1 + np.arange(white.shape[1])) ** -random.uniform(0, 0.6, (len(sounds), 1))
    noise = np.fft.irfft(white * tilt, n=moved.shape[1])
    decibels = random.uniform(0, 20, (len(sounds), 1))
    loudness = np.sqrt((moved**2).mean(axis=1, keepdims=True) / (noise**2).mean(axis=1, keepdims=True))
    return (moved + noise * loudness * 10 ** (-decibels / 20)).astype(np.float32)


def spectra(sounds: np.ndarray) -> np.ndarray:
    """Logarithm of the mel bands, roughly of mean 0 and deviation 1: (N, 11008) to float32 (N, 1, 40, 84)."""
    frames = np.lib.stride_tricks.sliding_window_view(sounds, WINDOW, axis=1)[:, ::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames.astype(np.float32))) ** 2
    bands = np.log(power @ _mel_bands() + 1e-5).transpose(0, 2, 1)[:, None]
    return ((bands - MEAN) / STD).astype(np.float32)


def _mel_bands() -> np.ndarray:
    """Triangles at equal distances on the mel scale, (193 frequencies, 40)."""
    mels = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = (700 * (10 ** (mels / 2595) - 1))[None]
    frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (frequencies - edges[:, :-2]) / (edges[:, 1:-1] - edges[:, :-2])
    falling = (edges[:, 2:] - frequencies) / (edges[:, 2:] - edges[:, 1:-1])
    return np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)


class Batches:
    """Train batches (N, 1, 40, 84) float32 and (N,) int64, with other noise on every pass."""

    def __init__(self, sounds: np.ndarray, words: np.ndarray, batch: int = 64) -> None:
        self.sounds, self.words, self.batch = sounds, words, batch

    def __len__(self) -> int:
        return -(-len(self.words) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        for index in torch.randperm(len(self.words)).split(self.batch):
            heard = spectra(noisy(self.sounds[index], random))
            yield torch.from_numpy(heard), torch.from_numpy(self.words[index])


def task() -> pj.Task:
    """Create the task, whose metric is accuracy."""
    sounds, words = clips("train")
    (test, test_words), (select, select_words) = (
        (spectra(noisy(said, np.random.default_rng(1))), numbers)
        for said, numbers in (clips(part) for part in ("test", "select"))
    )
    some = sounds[np.random.default_rng(2).permutation(len(sounds))[:256]]
    return pj.tasks.classification(
        (test, test_words),
        select=(select, select_words),
        train=Batches(sounds, words),
        calibration=spectra(noisy(some, np.random.default_rng(3))),
        name="spoken-words",
    )
