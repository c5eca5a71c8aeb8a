"""What training hears: log-mel of the questions, each time a little different.

voice     stretched in time, the mel axis scaled and bent, harmonics smoothed, filtered by a curve
room      silence before and after, a coloured noise floor, a random level
masks     stretches of time and of frequency blanked out

The result is normalised as `features.log_mel` does: unvaried, it is what a device computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from deeptalk_edge.model.features import FFT_SAMPLES, HOP_SAMPLES, mel_filters
from deeptalk_edge.model.spec import EncoderSpec

Floats = npt.NDArray[np.float32]

_FLOOR = -10.0  # log10 of the power of digital silence, as in `features`


@dataclass(frozen=True, slots=True, kw_only=True)
class HearingSettings:
    """How far the augmentation goes; mel frames are 10 ms."""

    stretch: tuple[float, float] = (0.82, 1.22)
    warp: tuple[float, float] = (0.86, 1.16)
    """Factor on the mel axis: other vocal tracts."""

    bend: float = 4.0
    """Largest shift of the middle of the mel axis, in bins: mouths of another shape."""

    blur_share: float = 0.6
    """Share of the utterances whose harmonics are more or less smoothed away: other pitches."""

    max_lead_frames: int = 50
    max_trail_frames: int = 100
    equaliser: float = 0.5
    """Largest gain of each component of the filter, in log10 of power."""

    level: tuple[float, float] = (-1.2, 0.2)
    noise_below_peak: tuple[float, float] = (2.5, 7.0)
    """Level of the noise floor under the loudest mel bin, in log10 of power."""

    noise_share: float = 0.7
    """Share of the utterances that have a noise floor at all."""

    max_masked_frames: int = 14
    max_masked_bins: int = 10
    mask_share: float = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Takes:
    """How a batch of Q utterances is to be heard; drawn on the host, so lengths are known early."""

    utterances: npt.NDArray[np.int64]
    stretch: Floats
    warp: Floats
    lead: npt.NDArray[np.int64]
    mel_frames: npt.NDArray[np.int64]
    """Length with the silence on both sides."""

    strength: float

    @property
    def num_frames(self) -> npt.NDArray[np.int64]:
        """Encoder frames that the model keeps of each, (Q,)."""
        return self.mel_frames // 2 + 1


class Ear:
    """The log-mel power of many utterances, on the device, ready to be varied."""

    def __init__(
        self, clips: Iterable[Floats], spec: EncoderSpec, settings: HearingSettings, device: str
    ) -> None:
        self._spec, self._settings, self._device = spec, settings, torch.device(device)
        filters = torch.from_numpy(mel_filters(spec.num_mel_bins)).float().to(device)
        mels = [_log_power(torch.from_numpy(clip).to(device), filters).half() for clip in clips]
        lengths = [mel.shape[0] for mel in mels]
        self._lengths = np.array(lengths, np.int64)
        self._starts = np.cumsum([0, *lengths[:-1]])
        self._mels = torch.cat(mels)  # (frames, M)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Mel frames of every utterance, as it was recorded."""
        return self._lengths

    def plan(
        self,
        utterances: npt.NDArray[np.int64],
        rng: np.random.Generator,
        strength: float = 1.0,
        *,
        full_margins: bool = False,
    ) -> Takes:
        """Draw how to hear these utterances; at a `strength` of 0 they are left as they are.

        With `full_margins` the silence on both sides is as long as it can be.
        """
        s, count = self._settings, len(utterances)
        stretch = 1 + strength * (rng.uniform(*s.stretch, count).astype(np.float32) - 1)
        lead = rng.integers(0, round(strength * s.max_lead_frames) + 1, count)
        trail = rng.integers(0, round(strength * s.max_trail_frames) + 1, count)
        if full_margins:
            lead = np.full(count, s.max_lead_frames)
            trail = np.full(count, s.max_trail_frames)
        spoken = np.ceil(self._lengths[utterances] * stretch).astype(np.int64)
        limit = 2 * self._spec.max_frames - 2
        lead = np.minimum(lead, np.maximum(0, limit - spoken))
        return Takes(
            utterances=utterances,
            stretch=stretch,
            warp=1 + strength * (rng.uniform(*s.warp, count).astype(np.float32) - 1),
            lead=lead,
            mel_frames=np.minimum(lead + spoken + trail, limit),
            strength=strength,
        )

    def hear(self, takes: Takes, window: int, rng: np.random.Generator) -> Tensor:
        """The normalised log-mel (Q, M, window) of the takes; what lies beyond the window is
        cut."""
        s, device, num_bins = self._settings, self._device, self._spec.num_mel_bins
        generator = torch.Generator(device).manual_seed(int(rng.integers(1 << 62)))
        count, much = len(takes.utterances), takes.strength

        def column(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.asarray(values, np.float32)).to(device)[:, None, None]

        def uniform(low: float, high: float) -> Tensor:
            return column(rng.uniform(low, high, count))

        length = column(takes.mel_frames)
        time = torch.arange(window, device=device, dtype=torch.float32)[None, :, None]
        bins = torch.arange(num_bins, device=device, dtype=torch.float32)[None, None]
        spoken = self._stretched(takes, time)
        phase = bins / num_bins * torch.pi
        shift = uniform(-1.5, 1.5) + uniform(-s.bend, s.bend) * (phase * (1 + rng.random())).sin()
        spoken = _warped(spoken, bins * column(takes.warp) + much * shift)
        blurred = column(rng.random(count) < much * s.blur_share)
        spoken = torch.lerp(spoken, _smoothed(spoken), blurred * uniform(0, 1))
        for harmonic in range(1, 4):
            spoken = spoken + much * uniform(-s.equaliser, s.equaliser) * (phase * harmonic).cos()
        peak = spoken.amax(dim=(1, 2), keepdim=True)
        noise = peak - uniform(*s.noise_below_peak) + uniform(-0.8, 0.8) * phase.cos()
        flutter = torch.rand(count, window, num_bins, generator=generator, device=device)
        noise = noise + (-flutter.clamp(min=1e-6).log()).log10() * 0.7
        noisy = column(rng.random(count) < much * s.noise_share)
        noise = torch.where((noisy > 0) & (time < length), noise, _FLOOR)
        heard = torch.logaddexp(spoken * _LN10, noise * _LN10) / _LN10 + much * uniform(*s.level)
        heard = torch.where(time < length, heard, _FLOOR).clamp(min=_FLOOR)
        heard = torch.maximum(heard, heard.amax(dim=(1, 2), keepdim=True) - 8.0)
        return self._masked((heard + 4.0) / 4.0, takes, rng).transpose(1, 2)

    def _stretched(self, takes: Takes, time: Tensor) -> Tensor:
        """(Q, window, M): the recordings at their places, digital silence around them."""
        device = self._device
        lead = torch.from_numpy(takes.lead).to(device)[:, None]
        stretch = torch.from_numpy(takes.stretch).to(device)[:, None]
        last = torch.from_numpy(self._lengths[takes.utterances] - 1).to(device)[:, None]
        start = torch.from_numpy(self._starts[takes.utterances]).to(device)[:, None]
        source = (time[..., 0] - lead) / stretch  # (Q, window)
        inside = (source >= 0) & (source <= last)
        floor = source.floor().clamp(min=0).minimum(last - 1)
        index = start + floor.long()
        share = (source - floor).clamp(0, 1)[..., None]
        mel = self._mels[index].float() * (1 - share) + self._mels[index + 1].float() * share
        return torch.where(inside[..., None], mel, _FLOOR)

    def _masked(self, heard: Tensor, takes: Takes, rng: np.random.Generator) -> Tensor:
        s, (count, window, num_bins) = self._settings, heard.shape
        time_mask = np.zeros((count, window, 1), np.bool_)
        bin_mask = np.zeros((count, 1, num_bins), np.bool_)
        for i in range(count):
            if rng.random() > takes.strength * s.mask_share:
                continue
            for _ in range(2):
                at = int(rng.integers(0, max(1, min(window, int(takes.mel_frames[i])))))
                time_mask[i, at : at + int(rng.integers(0, s.max_masked_frames + 1))] = True
                at = int(rng.integers(0, num_bins))
                bin_mask[i, 0, at : at + int(rng.integers(0, s.max_masked_bins + 1))] = True
        mask = torch.from_numpy(time_mask).to(heard.device) | torch.from_numpy(bin_mask).to(
            heard.device
        )
        return torch.where(mask, heard.amin(dim=(1, 2), keepdim=True), heard)


_LN10 = float(np.log(10.0))


def _log_power(pcm: Tensor, filters: Tensor) -> Tensor:
    """log10 of the mel power (frames, M), silence around the clip, before any normalisation."""
    padded = F.pad(pcm, (FFT_SAMPLES // 2, FFT_SAMPLES))
    spectrum = torch.stft(
        padded,
        FFT_SAMPLES,
        HOP_SAMPLES,
        window=torch.hann_window(FFT_SAMPLES, device=pcm.device),
        center=False,
        return_complex=True,
    )
    power = filters @ (spectrum.real.square() + spectrum.imag.square())
    return power.clamp(min=10.0**_FLOOR).log10().T


def _smoothed(mel: Tensor) -> Tensor:
    """(Q, T, M) with every bin the mean of five neighbours."""
    return F.avg_pool1d(mel, 5, stride=1, padding=2, count_include_pad=False)


def _warped(mel: Tensor, source: Tensor) -> Tensor:
    """Read (Q, T, M) at fractional bins `source` (Q, 1, M)."""
    source = source.clamp(0, mel.shape[-1] - 1.001).expand(-1, mel.shape[1], -1)
    floor = source.floor()
    share = source - floor
    index = floor.long()
    return mel.gather(2, index) * (1 - share) + mel.gather(2, index + 1) * share
