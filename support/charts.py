"""Pictures of the tables of `reproduce.py`; needs matplotlib."""


def dots(path, title, groups):
    """One panel a world: a label a line, a dot a seed. groups: {world: {label: [share]}}."""
    plt = matplotlib()
    tallest = max(map(len, groups.values()))
    figure, panels = plt.subplots(
        1, len(groups), figsize=(4.5 * len(groups), 1 + 0.32 * tallest), squeeze=False
    )
    for panel, (world, labels) in zip(panels[0], groups.items()):
        for y, (label, shares) in enumerate(labels.items()):
            percent = [100 * share for share in shares]
            mean = sum(percent) / len(percent)
            panel.plot(percent, [y] * len(percent), "o", color="0.7")
            panel.plot([mean], [y], "|", color="black", markersize=14)
        panel.set_yticks(range(len(labels)), list(labels))
        panel.invert_yaxis()
        panel.set_title(world)
        panel.set_xlabel("sampled, %")
    finish(plt, figure, path, title)


def curves(path, title, groups):
    """One panel a world: each method's score over its seconds, means of seeds. groups: {world:
    {method: [(seconds, share)]}}."""
    plt = matplotlib()
    figure, panels = plt.subplots(
        1, len(groups), figsize=(4.5 * len(groups), 4), squeeze=False, sharey=True
    )
    for panel, (world, methods) in zip(panels[0], groups.items()):
        for method, points in methods.items():
            seconds, shares = zip(*points)
            panel.plot(seconds, [100 * share for share in shares], "o-", label=method)
        panel.set_title(world)
        panel.set_xlabel("seconds after SFT")
    panels[0][0].set_ylabel("sampled, %")
    panels[0][-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    finish(plt, figure, path, title)


def heat(path, across, up, gains):
    """SWIRL minus Bootstrap, by busy (across) and number of pairs (up); None: not run."""
    plt = matplotlib()
    figure, panel = plt.subplots(figsize=(6, 4))
    most = max(abs(gain) for row in gains for gain in row if gain is not None)
    values = [[float("nan") if gain is None else gain for gain in row] for row in gains]
    image = panel.imshow(values, cmap="RdBu", vmin=-most, vmax=most, origin="lower")
    for i, row in enumerate(gains):
        for j, gain in enumerate(row):
            panel.text(j, i, "" if gain is None else f"{gain:+.1f}", ha="center", va="center")
    panel.set_xticks(range(len(across)), across)
    panel.set_yticks(range(len(up)), [n or "all" for n in up])
    panel.set_xlabel("share of transitions in which somebody else acts as well")
    panel.set_ylabel("state-only pairs")
    figure.colorbar(image, label="points")
    finish(plt, figure, path, "sampled: SWIRL minus Bootstrap")


def matplotlib():
    """pyplot, without a window."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def finish(plt, figure, path, title):
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
