"""nbgrader's settings for a course on these exercises, and an exporter: student, exercise, property, points.

``python -m minidsv3 exercises build --course-seed S --out COURSE`` copies it beside ``source/``; run nbgrader there.
"""

import csv
import os
from pathlib import Path

from nbgrader.api import MissingEntry
from nbgrader.plugins.export import ExportPlugin
from nbgrader.preprocessors import NbGraderPreprocessor


class PropertyExporter(ExportPlugin):
    """One line for each student, exercise and property; work that was not handed in has empty points."""

    def export(self, gradebook):
        with Path(self.to or "grades.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["student", "exercise", "property", "points", "max_points"])
            for assignment in gradebook.assignments:
                for student in gradebook.students:
                    writer.writerows(self._rows(gradebook, assignment, student))

    def _rows(self, gradebook, assignment, student):
        try:
            submission = gradebook.find_submission(assignment.name, student.id)
        except MissingEntry:
            for notebook in assignment.notebooks:
                for cell in notebook.grade_cells:
                    yield [student.id, assignment.name, cell.name, "", f"{cell.max_score:g}"]
            return
        for notebook in submission.notebooks:
            for grade in sorted(notebook.grades, key=lambda grade: grade.name):
                yield [student.id, assignment.name, grade.name, f"{grade.score:g}", f"{grade.max_score:g}"]


class ClearTracebacks(NbGraderPreprocessor):
    """An error in a graded cell shows its lines, hidden ones too: keep the error's name and text alone."""

    def preprocess_cell(self, cell, resources, index):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                output["traceback"] = [f"{output['ename']}: {output['evalue']}"]
        return cell, resources


os.environ["MINIDSV3_GRADING"] = "1"  # each submission is run once, and only for the graded cells
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small arrays; and two of these may run side by side
c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "minidsv3"
c.ExportApp.plugin_class = PropertyExporter
# `check` stops a hanging solution after 5 s, once a notebook; this is for a loop in a cell itself. No cell of ours
# needs more: six properties of 5 s.
c.Execute.timeout = 30
c.Execute.interrupt_on_timeout = True
# Feedback shows the notebook as it was graded: without this line the hidden tests and their seeds would be in it.
c.GenerateFeedback.preprocessors = [
    "nbgrader.preprocessors.GetGrades",
    "nbgrader.preprocessors.ClearHiddenTests",
    ClearTracebacks,
    "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
]
