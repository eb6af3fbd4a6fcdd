"""A form over the parameters in JupyterLab: apply, load, save, check. Headless: what is not default."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ascend_kit.files import os_error_text, write_atomic
from ascend_kit.messages import phrase, translate
from ascend_kit.params import Experiment, ParameterError, build_experiment, load_experiment
from ascend_kit.params.experiment import kind_of
from ascend_kit.params.fields import FRAMEWORKS, PRECISIONS
from ascend_kit.params.notebook import applied
from ascend_kit.params.values import choices
from ascend_kit.params.yaml_file import parse_overrides
from ascend_kit.show.progress import in_browser
from ascend_kit.show.tables import readable

if TYPE_CHECKING:
    import pandas
    from IPython.display import HTML

# Title -> first parameter of the group; a group reaches to the next one's first.
GROUPS = {
    "Run": "experiment",
    "Model": "model_name",
    "Device": "device",
    "Engine": "max_seq_length",
    "Generation": "prompts_file",
    "Sweep": "engines",
    "Evaluation": "eval_datasets",
    "Comparison": "compare_runs",
}
# What another model needs; the rest stands folded below.
FIRST = ("input_model", "model_name", "device", "dataset_path")
NAMES = ("model_name", "experiment")  # follow the model until a person writes one
PARAMETER_FOLDER = Path("params")
BAD = ("panel.invalid", "panel.not_ready", "panel.not_written")


class ParameterPanel:
    """Shows an experiment's parameters; `experiment` is the last state that passed the check.

    `check` looks further than at the values (paths, data, conversion) and raises ValueError with what is wrong.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        check: Callable[[Experiment], object] | None = None,
        browser: bool | None = None,
    ) -> None:
        # In the words that were written: the form shows `demo` and not where its model lies.
        self.experiment = self._shown = build_experiment(experiment.model_dump(exclude_unset=True))
        self._look_further = check
        self._browser = in_browser() if browser is None else browser
        self.fields: dict[str, Any] = {}
        self._names_shown = {name: getattr(self.experiment, name) for name in NAMES}

    def table(self) -> pandas.DataFrame:
        """Value and meaning of every parameter that is not at its default."""
        import pandas

        defaults = build_experiment({})
        rows = []
        for title, key in ((title, key) for title, keys in grouped().items() for key in keys):
            value, default = getattr(self.experiment, key), getattr(defaults, key)
            if value != default:
                values = {"value": _as_text(value), "default": _as_text(default), "meaning": _meaning(key)}
                rows.append({"group": phrase(title), "parameter": key, **values})
        return pandas.DataFrame(rows)

    def check(self) -> str:
        """Validate the fields as they stand and what they name; returns the message that the form shows."""
        if fault := self._read():
            return fault
        try:
            if self._look_further is not None:
                self._look_further(self.experiment)
        except (ValueError, OSError) as error:
            return translate("panel.not_ready", error=error)
        return translate("panel.fine", folder=self.experiment.run_folder)

    def apply(self) -> str:
        """This kernel's notebook uses the fields from now on, above its cells and above its parameter file."""
        if fault := self._read():
            return fault
        changed = self._changed()
        applied.update(changed)
        if not applied:
            return translate("panel.nothing")
        return translate("panel.applied", values=", ".join(f"{key}={value!r}" for key, value in applied.items()))

    def load(self, path: str | Path) -> str:
        """Fill the fields from a parameter file; nothing uses them before Apply or Save."""
        try:
            loaded = load_experiment(path)
        except ParameterError as error:
            return translate("panel.invalid", error=error)
        # Names last: another model changes its name, and that the experiment's.
        for key in sorted(self.fields, key=lambda key: NAMES.index(key) if key in NAMES else -1):
            self.fields[key].value = _field_value(key, getattr(loaded, key))
        return translate("panel.loaded", path=path)

    def save(self, path: str | Path) -> str:
        """Write a file that gives exactly the experiment in the fields."""
        if fault := self._read():
            return fault
        told = translate("panel.replaced" if Path(path).exists() else "panel.written", path=path)
        try:
            if Path(path).is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
            write_atomic(Path(path), _minimal_yaml(self.experiment))
        except OSError as error:
            return translate("panel.not_written", error=os_error_text(error))
        return told

    def _read(self) -> str | None:
        """Take the fields over into `experiment`; what is wrong with them, if anything."""
        try:
            values = {**self._shown.model_dump(exclude_unset=True), **self._changed()}
            self.experiment = build_experiment(values, source="the form")
        except ParameterError as error:
            return translate("panel.invalid", error=error)
        return None

    def _changed(self) -> dict[str, Any]:
        """The fields that differ from the experiment first shown, or that were applied. ParameterError for no YAML."""
        values = {key: _typed(key, field.value) for key, field in self.fields.items()}
        return {key: value for key, value in values.items() if key in applied or value != getattr(self._shown, key)}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        table = readable(self.table())
        if self._browser:
            show_widget(self.widget(), table)
        else:
            display(table)

    def widget(self) -> Any:
        """The form as an ipywidgets box."""
        import ipywidgets as w

        self.fields = {key: self._field(w, key) for key in Experiment.model_fields}
        self.fields["input_model"].continuous_update = False  # half a path has no name, and would come in late
        self.fields["input_model"].observe(self._name_after_model, "value")
        self.fields["model_name"].continuous_update = False
        # Results of another model go to a folder of their own, beside which nothing has to agree.
        self.fields["model_name"].observe(lambda change: self._follow("experiment", change["new"]), "value")
        pages = {title: [key for key in keys if key not in FIRST] for title, keys in grouped().items()}
        titles = [phrase(title) for title in pages]
        tabs = w.Tab(children=[_rows(w, keys, self.fields) for keys in pages.values()], titles=titles)
        more = w.Accordion(children=[tabs], titles=[translate("panel.more")], selected_index=None)
        files = sorted(str(path) for path in PARAMETER_FOLDER.glob("*.y*ml"))
        source = w.Dropdown(options=files, layout={"width": "260px"})
        target = w.Text(value=f"{PARAMETER_FOLDER}/{self.experiment.experiment}-new.yaml", layout={"width": "260px"})
        message, no_files = w.HTML(), translate("panel.no_files", folder=PARAMETER_FOLDER)
        actions = {
            "check": self.check,
            "apply": self.apply,
            "load": lambda: self.load(source.value) if source.value else no_files,
            "save": lambda: self.save(target.value.strip()),
        }
        buttons = {}
        for name, action in actions.items():
            buttons[name] = w.Button(description=translate(f"panel.{name}"), layout={"width": "90px"})
            buttons[name].on_click(lambda _, action=action: _say(message, action()))
        bar = [buttons["check"], buttons["apply"], buttons["load"], source, buttons["save"], target]
        return w.VBox([_rows(w, FIRST, self.fields), more, w.HBox(bar, layout={"flex_flow": "row wrap"}), message])

    def _field(self, w: Any, key: str) -> Any:
        value = _field_value(key, getattr(self.experiment, key))
        layout = {"width": "300px"}
        if choices := _choices(key):
            return w.Dropdown(options=choices, value=value, layout=layout)
        if isinstance(value, bool):
            return w.Checkbox(value=value, indent=False, layout=layout)
        return w.Text(value=value, placeholder="none" if "None" in kind_of(key) else "", layout=layout)

    def _name_after_model(self, change: Mapping[str, Any]) -> None:
        """Another model brings its name along."""
        try:
            self._follow("model_name", build_experiment({"input_model": change["new"]}).model_name)
        except ParameterError:
            return

    def _follow(self, name: str, value: str) -> None:
        """Change a name that is still as the form wrote it; a name of the user's own stays."""
        field = self.fields[name]
        if field.value in (self._names_shown[name], getattr(self._shown, name)):
            field.value = self._names_shown[name] = value


def show_widget(widget: Any, table: HTML | None = None) -> None:
    """Show a widget; a reader without a kernel cannot draw it and gets the table in its place, or nothing."""
    from IPython.display import display

    other = {"text/html": table.data if table else "<span></span>", "text/plain": ""}
    display({**widget._repr_mimebundle_(), **other}, raw=True)


def grouped() -> dict[str, list[str]]:
    """Group title -> its parameters, in the order of the Experiment."""
    titles = {first: title for title, first in GROUPS.items()}
    groups: dict[str, list[str]] = {}
    title = next(iter(GROUPS))
    for key in Experiment.model_fields:
        title = titles.get(key, title)
        groups.setdefault(title, []).append(key)
    return groups


def _meaning(key: str) -> str:
    return phrase(Experiment.model_fields[key].description or "")


def _rows(w: Any, keys: tuple[str, ...] | list[str], fields: Mapping[str, Any]) -> Any:
    """Name, field and meaning below each other in three columns; a long meaning takes a second line."""
    cells = []
    for key in keys:
        meaning = escape(_meaning(key))
        cells += [w.HTML(f"<code>{key}</code>"), fields[key], w.HTML(f"<span style='line-height:1.3'>{meaning}</span>")]
    layout = {"grid_template_columns": "max-content 310px minmax(200px, 1fr)", "grid_gap": "2px 12px"}
    return w.GridBox(cells, layout=layout)


def _say(message: Any, text: str) -> None:
    is_bad = text.startswith(tuple(translate(key, error="") for key in BAD))
    message.value = f"<div style='white-space:normal;color:{'#b3261e' if is_bad else 'inherit'}'>{escape(text)}</div>"


def _choices(key: str) -> list[str]:
    """Allowed words of a parameter that is a choice, else nothing."""
    named = {"precision": PRECISIONS, "framework": FRAMEWORKS}.get(key)
    if named is not None:
        return list(dict.fromkeys(named.values()))
    return ["", "true", "false"] if kind_of(key) == "bool | None" else choices(Experiment, key)


def _field_value(key: str, value: Any) -> Any:
    """What a field holds for a value: itself for a check box, else text, empty for none."""
    if value is None:
        return ""
    if _is_text(key):
        return value
    return value if isinstance(value, bool) and not _choices(key) else _as_text(value)


def _typed(key: str, value: Any) -> Any:
    """A field's value: names and paths as they stand, others read as YAML. ParameterError for what is no YAML."""
    if not isinstance(value, str):
        return value
    if _is_text(key):
        return None if value.strip() in ("", "null") else value.strip()
    try:
        return parse_overrides([f"{key}={value}"])[key]
    except ParameterError as error:
        raise ParameterError(str(error).replace("--set", "the form:", 1)) from None


def _is_text(key: str) -> bool:
    return kind_of(key) in ("str", "str | None") and not _choices(key)


def _minimal_yaml(experiment: Experiment) -> str:
    """The experiment's name and every parameter that the file would not give without it."""
    wanted = experiment.model_dump(exclude={"params_file"})
    defaults = build_experiment({}).model_dump()
    written = {key: value for key, value in wanted.items() if key == "experiment" or value != defaults[key]}
    try:
        given = build_experiment(written).model_dump()
    except ParameterError:  # a part of the parameters need not go together although all of them do
        return experiment.to_yaml()
    written = {key: value for key, value in wanted.items() if key in written or value != given[key]}
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True)


def _as_text(value: Any) -> str:
    """The value in one line of YAML, as a person would write it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
