"""The loop as an Airflow DAG: one task a step, every day, each in a process of the `loopbook` command.

Put this file, or a link to it, into Airflow's DAG folder. Airflow needs nothing of Loopbook in its own environment: the
variable LOOPBOOK of the workers' environment says where the command is, LOOPBOOK_HOME where settings.ini and data are.
Each step runs every day, changed or not; `loopbook loop`, which one task or a job of scheduled/ can run, leaves out
what has not changed."""
from datetime import timedelta

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Param

STEPS = ("download", "merge", "train", "evaluate")

with DAG(
    "loopbook",
    description="Download, merge feedback, train, evaluate, promote a better model",
    schedule="@daily",
    start_date=pendulum.datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5), "retry_exponential_backoff": True,
                  "execution_timeout": timedelta(hours=12)},
    params={"recipe": Param("faces", type="string", pattern="^[a-z0-9][a-z0-9_]*$",
                            description="a recipe of settings.ini")},
    tags=["loopbook"],
    doc_md=__doc__,
) as dag:
    before = None
    for step in STEPS:
        command = f'"${{LOOPBOOK:-loopbook}}" run {step} -p recipe {{{{ params.recipe }}}}'
        task = BashOperator(task_id=step, bash_command=command, append_env=True)
        if before: before >> task
        before = task
