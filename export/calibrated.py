"""What an export requires of a calibration table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from deeptalk_edge.bundle.expert_record import ExpertForm
from deeptalk_edge.calibration.table import OpenTable
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.errors import ParityError, SettingsError


def check_exportable(table: OpenTable, profile: DeviceProfile) -> None:
    """Raises ParityError if the table's accuracy gate failed, SettingsError if the profile's
    backend does not hold its experts so."""
    gate = table.table.calibration.gate
    if gate is not None and not gate.passed:
        measures = gate.measures
        found = ", ".join(
            f"{name} is {measures[name].value:.4g}, allowed {measures[name].limit:.4g}"
            for name in gate.failed
        )
        raise ParityError(
            f"{table.path}: the accuracy gate failed: {found}. Calibrate with more utterances, "
            "another method or finer experts, or set other limits in the profile's [gate]"
        )
    if profile.backend == "ort":
        raise SettingsError(
            f"{table.path}: backend ort holds float32 experts; export for --device cpu-int8, which "
            "ONNX Runtime runs as well"
        )


def common_form(forms: Iterable[ExpertForm]) -> ExpertForm:
    """The form of most layers."""
    return Counter(forms).most_common(1)[0][0]


def other_forms(layers: Mapping[str, ExpertForm]) -> dict[str, ExpertForm]:
    """The layers whose form is not the common one."""
    common = common_form(layers.values())
    return {layer: form for layer, form in layers.items() if form != common}
