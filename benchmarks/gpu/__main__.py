"""See `benchmarks.gpu.language`."""

import sys

from benchmarks.gpu.language import main

if __name__ == "__main__":
    sys.exit(main())
