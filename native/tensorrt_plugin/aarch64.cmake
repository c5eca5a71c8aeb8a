# Cross build for Jetson (sm_87, sm_110) on an x86-64 machine with g++-aarch64-linux-gnu.
# CUDA 13 code wants JetPack 7; for JetPack 6 use a CUDA 12.6 toolkit, or build on the device.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
