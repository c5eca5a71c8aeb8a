"""Routed experts: residency and paging of their weights.

decide    slots, policy, residency: pure; the live pager and the simulator share them
move      pager and leases; below them loader, reader, record_file and pool (cuda_pool on a GPU)
serve     paged, the engine's interface; look_ahead, degrade; sizing; open
study     routes, the recordings that devices/replay/ reads
"""
