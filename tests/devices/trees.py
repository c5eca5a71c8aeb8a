"""Machines as trees of files, as their kernels show them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

NVPMODEL_CONF = """
< PARAM TYPE=CLOCK NAME=EMC >
MAX_FREQ /sys/kernel/nvpmodel_emc_cap/emc_iso_cap
< POWER_MODEL ID=0 NAME=15W >
EMC MAX_FREQ 2133000000
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""

ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
    "proc/meminfo": "MemTotal:        7802332 kB\nMemAvailable:    6900000 kB\n"
    "SwapTotal:       3900000 kB\nSwapFree:        3900000 kB\n",
    "etc/nvpmodel.conf": NVPMODEL_CONF,
    "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "47500",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone1/temp": "-256000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "1100",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_SOC",
    "sys/class/hwmon/hwmon1/in2_input": "5000",
    "sys/class/hwmon/hwmon1/curr2_input": "300",
}

THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.1, GCID: 1, BOARD: generic",
    "proc/meminfo": "MemTotal:      128806132 kB\n",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1692000000",
    "sys/class/hwmon/hwmon2/name": "ina3221",
    "sys/class/hwmon/hwmon2/in1_label": "VDD_GPU",
    "sys/class/hwmon/hwmon2/in1_input": "12000",
    "sys/class/hwmon/hwmon2/curr1_input": "500",
    "sys/class/hwmon/hwmon2/in2_label": "VIN",
    "sys/class/hwmon/hwmon2/in2_input": "19000",
    "sys/class/hwmon/hwmon2/curr2_input": "2000",
}

PC = {
    "sys/class/dmi/id/product_name": "A desktop",
    "proc/meminfo": "MemTotal:       32700000 kB\nMemAvailable:   20000000 kB\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 4060\n"
    "IRQ:   \t\t 148\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "262143000000",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "sys/devices/system/cpu/smt/active": "1",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3",
}


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """Write a machine's files below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
