"""The TensorRT backends: engines run all of a bundle on one GPU, by full TensorRT or TensorRT-RTX.

streams   encoder and language model share one stream and one scratch buffer; the codec has its own
          stream of high priority, so its few kernels do not wait for the hundreds of a step
"""

from __future__ import annotations

from deeptalk_edge.bundle.manifest import ENGINES, Manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.backends.base import Backend, BackendSettings, SelfCheck
from deeptalk_edge.runtime.backends.tensorrt.codec import TensorrtCodec
from deeptalk_edge.runtime.backends.tensorrt.device import open_device
from deeptalk_edge.runtime.backends.tensorrt.encoder import TensorrtEncoder
from deeptalk_edge.runtime.backends.tensorrt.engine import TensorrtEngine
from deeptalk_edge.runtime.backends.tensorrt.engine_file import LoadedEngine, attach_all
from deeptalk_edge.runtime.backends.tensorrt.experts import ResidentExperts
from deeptalk_edge.runtime.backends.tensorrt.kernel_cache import KernelCache
from deeptalk_edge.runtime.lm.encoder import Encoder

TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
"""Tolerance by the precision of a part. Float32 differs by the order of sums, 1e-5; float16 by
rounding, 4e-3 against the same graphs in torch. A wrong weight, expert or row gives 0.1 or more."""


def open_backend(bundle: Bundle, settings: BackendSettings) -> Backend:
    """Check the machine, then load everything.

    Raises BackendError if CUDA, TensorRT or the plugin cannot be used, ArtifactError if the bundle
    is not for this machine, DoesNotFit if the device has not enough memory, SettingsError if the
    settings exceed what the engines were built for.
    """
    _check_settings(bundle, settings)
    manifest, device = bundle.manifest, open_device(bundle, KernelCache(settings.kernel_cache))
    try:
        main, urgent = device.stream(), device.stream(is_urgent=True)
        engines = {name: LoadedEngine(device, bundle, name) for name in ENGINES}
        attach_all(device, main, [engines[name] for name in ENGINES if name != "codec"])
        attach_all(device, urgent, [engines["codec"]])
        spec = manifest.model.encoder
        encoder = TensorrtEncoder(device, engines["encoder"], spec, stream=main)
        codec = TensorrtCodec(device, engines["codec"], manifest.codec, stream=urgent)
        engine = TensorrtEngine(
            device,
            bundle,
            engines,
            stream=main,
            context_rows=settings.context_rows,
            num_items=settings.num_items,
            uses_graphs=settings.cuda_graphs,
        )
        device.kernels.save()  # now, not at the end alone: a kiosk may lose its power
    except BaseException:
        device.close()
        raise
    return Backend(
        name="tensorrt",
        kernel_path=f"{device.version}, {device.machine.compute_capability}",
        encoder=Encoder(encoder, spec),
        engine=engine,
        codec=codec,
        experts=ResidentExperts(),
        self_check=_self_check(manifest),
        gpu_stages=device.stages,
    )


def _check_settings(bundle: Bundle, settings: BackendSettings) -> None:
    """Raises SettingsError for settings that engines do not support."""
    if settings.encoder_window != "whole":
        raise SettingsError(
            f"{bundle.path}: its encoder is an engine for the whole window; leave out "
            "--encoder-window"
        )
    if settings.paging.pool is not None:
        raise SettingsError(
            f"{bundle.path}: engines keep all experts in the GPU's memory, there is no pool to "
            "choose; leave out --pool"
        )


def _self_check(manifest: Manifest) -> SelfCheck:
    names = {name: entry.engine or name for name, entry in manifest.engines.items()}
    precision = manifest.precision
    parts = [TOLERANCE.get(precision[part], 2e-2) for part in ("encoder", "kv_cache", "codec")]
    return SelfCheck(
        encoder=names["encoder"],
        decoder=f"{names['embed']}, {names['step']}, {names['head']}",
        codec=names["codec"],
        encoder_tolerance=parts[0],
        decoder_tolerance=parts[1],
        codec_tolerance=parts[2],
        features="features",
    )
