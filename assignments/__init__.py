"""The course: problems in the order of the paper, and a grader that needs no network.

    python -m assignments.make OUT        the student's tree
    python -m assignments.grade TREE      its points
    python -m assignments.mutate          does the grader grade?
"""
