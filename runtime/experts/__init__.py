"""Routed experts: where their weights are while a token needs them.

decide    slots, policy, residency: pure, and the same objects live and simulated
move      pager and leases, over loader, reader, record_file and pool (cuda_pool on a GPU)
serve     paged, what an engine asks; look_ahead, degrade; sizing and from_bundle open it
study     routes, recorded or synthetic; simulator, locality and study say what they cost
"""
