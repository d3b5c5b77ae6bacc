"""Many ranks: communicators and their ledger, the expert-parallel dispatcher, placement of experts, schedules.

Knows no model: what a rank computes is handed in. Reading order: comm, ranks, dispatcher, then eplb and placement.
"""
