"""Write the demo's data set: a casual sentence in, one line of calendar JSON out.

    python tools/make_demo_data.py

    system     Calendar
    user       Squeeze in a haircut with Marek on Friday at half past four, 45 minutes is enough
    assistant  {"what":"haircut","who":"Marek","day":"fri","at":"16:30","min":45}

The house schema: keys in this order; who and min only if they were said; day is today, tomorrow or mon .. sun; at is
on the 24-hour clock, from 08:00 to 19:59, so that a bare "five" can only be 17:00; min is the length in minutes. The
held-out rows share no event with the training rows, and most name a thing, a person or a time that training never saw.
"""

import json
import random
from pathlib import Path

from minillama.files import write_whole
from minillama.parallel.failures import user_errors

SEED = 20
TRAIN_ROWS, VALIDATION_ROWS = 800, 100
FOLDER = Path(__file__).parents[1] / "minillama" / "data"


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


WHAT = words(
    "a haircut, the dentist, lunch, dinner, breakfast, coffee, a team meeting, the budget review, piano practice, yoga, "
    "a swim, a run, the car service, parents' evening, a job interview, a phone call, the book club, choir, chess, "
    "German class, a driving lesson, the vet, the plumber, a flat viewing, a design review, the weekly standup, a demo, "
    "a guitar lesson, a bike ride, the board meeting, a photo shoot, grocery shopping, the eye test, a massage, physio, "
    "band practice, a picnic, a movie, the school run, a walk, therapy, football training, a planning session, pilates, "
    "the electrician, a blood test, the bank, gardening, a video call, a webinar, the museum, rowing, a barbecue, "
    "the concert, a check-up, karate, tea, the hairdresser, a wedding fitting, an exam, an appraisal, opera, quiz night, "
    "the supplier call, a fire drill, judo, homework, a workshop, the notary, tango class, a cake tasting, swimming, "
    "a status update, laundry, the garage, poker, a house tour, ballet, the retro, an audit, Spanish class, a lecture"
)
NEW_WHAT = words(
    "a tennis match, the optician, brunch, a pottery class, the tax advisor, drinks, a sales call, a rehearsal"
)
WHO = words(
    "Anna, Ben, Carla, David, Elena, Farid, Grace, Hugo, Ines, Jonas, Karim, Lena, Marek, Nadia, Oscar, Paula, Quentin, "
    "Rosa, Samir, Tara, Ursula, Victor, Wendy, Yusuf, Zoe, Mum, Dad, Dr Hall, Mrs Kim, Tom, Lucy, my boss, Grandma, "
    "Uncle Joe, Mr Silva, the kids, Fiona, Gregor, Bea, Olga, Pedro, Sven, Tim, Rita, Kofi, Leila, Magnus, Noor, Ivan, "
    "Dr Patel, Mrs Lopez, Mr Weber, my sister, our landlord, Aunt Rose, Harriet, Dmitri, Cem, Astrid, Emil, Finn, Freya"
)
NEW_WHO = words("Amira, Boris, Chloe, Dr Mendez, Felix, Mrs Olsen, Priya, Stefan, Aunt May, my neighbour")
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
HOURS = words("twelve, one, two, three, four, five, six, seven, eight, nine, ten, eleven")
LENGTHS = {
    15: ["15 minutes"],
    20: ["20 minutes", "twenty minutes"],
    30: ["half an hour", "30 minutes"],
    45: ["45 minutes"],
    60: ["an hour", "one hour"],
    90: ["an hour and a half", "90 minutes"],
    120: ["two hours", "2 hours"],
    180: ["three hours", "3 hours"],
}
NEW_TIMES = {(9, 15), (10, 30), (11, 0), (13, 45), (15, 15), (16, 30), (18, 0), (19, 30)}

PLAIN = [
    "{what}{who} {day} {at}{length}",
    "{day} {at}: {what}{who}{length}",
    "book {what}{who} {day} {at}{length}.",
    "please add {what} {at} {day}{who}{length}, thanks",
    "can you put in {what}{who} {day} {at}{length}?",
    "I have {what} {day} {at}{who}{length}",
    "{day} I'm having {what}{who} {at}{length}",
    "it's {what} {at} {day}{who}{length}, don't let me forget",
    "{what} is now {day} {at}{who}{length}",
    "remind me of {what}{who} {day}, {at}{length}",
    "so {day} it's {what}{who}, {at}{length}, ok?",
]
WITH_WHO = [
    "{name} wants {what} {day} {at}{length}",
    "{name} and I have {what} {day} {at}{length}",
    "{name} asked me for {what} {day} {at}{length}",
]
WITH_LENGTH = [
    "squeeze in {what}{who} {day} {at}, {span} is enough",
    "block {span} {day} {at} for {what}{who}",
    "{span} for {what}{who} {day} {at}",
]


def make_row(pick: random.Random, whats: list[str], whos: list[str], times: list[tuple[int, int]]) -> dict:
    what, day, (hour, minute) = pick.choice(whats), pick_day(pick), pick.choice(times)
    who = pick.choice(whos) if pick.random() < 0.55 else None
    length = pick.choice(list(LENGTHS)) if pick.random() < 0.55 else None

    kinds = [PLAIN, PLAIN] + [WITH_WHO] * (who is not None) + [WITH_LENGTH] * (length is not None)
    span = pick.choice(LENGTHS[length]) if length else ""
    bare = what.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    sentence = pick.choice(pick.choice(kinds)).format(
        what=what,
        name=who,
        who=f" with {who}" if who else "",
        day=day[0],
        at=f"at {say_time(pick, hour, minute)}",
        span=span,
        length=f" for {span}" if length else "",
    )
    if pick.random() < 0.7:
        sentence = sentence[0].upper() + sentence[1:]
    event = {"what": bare, "who": who, "day": day[1], "at": f"{hour:02}:{minute:02}", "min": length}
    answer = json.dumps({k: v for k, v in event.items() if v is not None}, separators=(",", ":"))
    # A short system message takes the place of the longer one that a chat template may have by default.
    turns = [("system", "Calendar"), ("user", sentence), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def pick_day(pick: random.Random) -> tuple[str, str]:
    """How it is said, and its name in the schema."""
    if pick.random() < 0.25:
        day = pick.choice(["today", "tomorrow"])
        return day, day
    day = pick.choice(DAYS)
    said = pick.choice([f"on {day}", f"on {day}", f"this {day}", day, f"on {day[:3]}"])
    return said, day[:3].lower()


def say_time(pick: random.Random, hour: int, minute: int) -> str:
    digits = f"{(hour - 1) % 12 + 1}" + (f":{minute:02}" if minute else "")
    half = "am" if hour < 12 else "pm"
    ways = [f"{digits} {half}", f"{digits}{half}", f"{hour:02}:{minute:02}"]
    if minute in (0, 30):
        ways.append(("half past " if minute else "") + HOURS[hour % 12])
    return "noon" if (hour, minute) == (12, 0) else pick.choice(ways)


def make_rows() -> tuple[list[dict], list[dict]]:
    pick = random.Random(SEED)
    times = [(hour, minute) for hour in range(8, 20) for minute in (0, 15, 30, 45)]
    known_times = [time for time in times if time not in NEW_TIMES]
    train: dict[str, dict] = {}  # by answer, so that no event comes twice or in both files
    while len(train) < TRAIN_ROWS:
        row = make_row(pick, WHAT, WHO, known_times)
        train.setdefault(row["messages"][2]["content"], row)
    validation: dict[str, dict] = {}
    while len(validation) < VALIDATION_ROWS:
        row = make_row(pick, WHAT + 4 * NEW_WHAT, WHO + 4 * NEW_WHO, known_times + 4 * sorted(NEW_TIMES))
        answer = row["messages"][2]["content"]
        if answer not in train:
            validation.setdefault(answer, row)
    return list(train.values()), list(validation.values())


if __name__ == "__main__":
    with user_errors():
        for name, rows in zip(("train", "validation"), make_rows(), strict=True):
            path = FOLDER / f"chat_{name}.jsonl"
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(f"{path.relative_to(FOLDER.parents[1])}: {len(rows)} rows")
