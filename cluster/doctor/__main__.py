"""`python -m cluster.doctor '{…}'`: the job that `luthier cluster doctor` submits."""

from cluster.doctor.visit import main

if __name__ == "__main__":
    main()
