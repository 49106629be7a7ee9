"""``python -m rlhf_doctor``."""

from rlhf_doctor.cli import main

if __name__ == "__main__":
    main()
