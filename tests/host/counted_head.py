"""The command line, which ends by saying how often the head was fused: python counted_head.py ARGUMENTS."""

import sys
from unittest import mock

from abkd_megatron.__main__ import main
from abkd_megatron.distillation import head

if __name__ == "__main__":
    fused = mock.Mock(wraps=head.vocab_parallel_distillation_head)
    head.vocab_parallel_distillation_head = fused
    code = main(sys.argv[1:])
    print("FUSED", fused.call_count, flush=True)
    sys.exit(code)
