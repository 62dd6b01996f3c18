"""A pipe connects two processes that talk while both are running: what one sends, the other
receives. Between a call and whoever submitted it there is one already, whose ends are
``future.channel`` and ``current().channel``. Use it to steer a call that goes on, or to hear
from it before it ends; what is there only at the end is better returned.
"""

from taskrun import current, task


@task(default=False)
def keeper(secret: int) -> int:
    """Say of each guess whether the secret is higher, until the other end is closed."""
    guesses = 0
    for guess in current().channel:
        guesses += 1
        right = guess == secret
        current().channel.send("right" if right else "higher" if guess < secret else "lower")
    return guesses


@task(timeout=30)
def play(secret: int = 42) -> None:
    """Guess, and halve what is left with each answer."""
    call = keeper.submit(secret)
    low, high, answer = 1, 100, ""
    while answer != "right":
        guess = (low + high) // 2
        call.channel.send(guess)
        answer = call.channel.recv(timeout=10)
        print(f"{guess}? {answer}")
        low, high = (guess + 1, high) if answer == "higher" else (low, guess - 1)
    call.channel.close()
    print(f"the keeper has counted {call.result()} guesses")
