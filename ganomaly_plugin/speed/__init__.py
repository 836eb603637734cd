"""How fast training and scoring are, beside peers, in one run: `bench speed`.

`timing` takes times in turns, `work` counts FLOPs and memory, `trainers` and `peers` prepare what is timed, `measure` puts
it together and `command` prints it.
"""
