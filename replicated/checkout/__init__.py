"""Writing a snapshot's files into a directory.

`planning` looks and decides, `writing` acts; a dry run is a plan that is shown. Both reach what lies in the
output directory only through `places`: descriptors of directories that are opened one name at a time
without following links, so that nothing outside is read or written, whatever lies there.

    steps = plan(tree, output, path=path, delete=delete)
    if not force:
        steps.refuse_conflicts()
    execute(steps, tree, on_progress)
"""

from replicated.checkout.planning import Action, Plan, Verb, plan
from replicated.checkout.writing import OnProgress, execute

__all__ = ["Action", "OnProgress", "Plan", "Verb", "execute", "plan"]
