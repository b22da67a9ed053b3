"""Six rooms, each with a lamp that is off, red, green or blue. "hall to red" makes the lamp in the
hall red, and changes nothing if it is. In busy logs somebody else sets the lamp of another room as
well."""
EPISODES, STEPS, STATE_ONLY = 120, 8, 1
PRESET = {}
ROOMS = ("hall", "attic", "cellar", "porch", "den", "bath")
COLOURS = ("off", "red", "green", "blue")


def show(lamps):
    return "\n".join(f"{room}: {lamps[room]}" for room in ROOMS)


def episode(rng, busy=0.0):
    """[(x, z, y)]. busy: the share of transitions in which somebody else acts as well."""
    lamps = {room: rng.choice(COLOURS) for room in ROOMS}
    rows = []
    for _ in range(STEPS):
        x = show(lamps)
        room, colour = rng.choice(ROOMS), rng.choice(COLOURS)
        lamps[room] = colour
        if rng.random() < busy:
            others = [other for other in ROOMS if other != room]
            lamps[rng.choice(others)] = rng.choice(COLOURS)
        rows.append((x, f"{room} to {colour}", show(lamps)))
    return rows
