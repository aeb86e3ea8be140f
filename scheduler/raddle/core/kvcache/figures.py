"""Figures of machines that KV decisions are made with, each with its source."""

from __future__ import annotations

#: KV of 512 tokens of DeepSeek-R1 in BF16: 70,272 bytes a token.
BLOCK_BYTES = 35_979_264
BLOCK_TOKENS = 512
#: One die's share of 6,688 tokens a second of an NPU of two (CloudMatrix384, table 2).
PREFILL_TOKENS_PER_S_A_DIE = 3_344.0
#: One prefill instance: 16 NPUs.
PREFILL_TOKENS_PER_S = 32 * PREFILL_TOKENS_PER_S_A_DIE
#: A die's write to another node over UB (CloudMatrix384, section 3).
WRITE_BYTES_PER_S = 134e9
#: Time of one output token of a sequence (CloudMatrix384, section 5.2: 4K prompts, batch 96).
TOKEN_S = 0.0494
#: What one sequence more adds to every step of its rank: the same measurement, by sequence.
SEQUENCE_S = TOKEN_S / 96
#: Bytes a second that repair may take of a host's network: a fifth of the 400 Gbit/s that a
#: CloudMatrix384 node has besides UB, so that serving keeps the rest.
REPAIR_BYTES_PER_S = 10e9
#: Copies of each block, unless a cache role says otherwise: a pool that survives the loss of any
#: one host.
KV_REPLICAS = 2
DIES_A_NODE = 16
NODES_A_RACK = 4
