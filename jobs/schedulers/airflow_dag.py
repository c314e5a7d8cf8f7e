"""Labels a day's tickets with mistral-batch, once a day: an Airflow DAG of two BashOperators.

A task that Airflow starts again, after a timeout or a lost worker, goes on with its own output: finished parts stay.
A date that is run again when it is done costs a second. BashOperator retries every exit code but 99, its own for skipped; those that no
retry can help (64 to 74, 78) fail again before any model is loaded, so two more tries of them cost next to nothing.
"""

from datetime import datetime, timedelta

from airflow import DAG

try:
    from airflow.providers.standard.operators.bash import BashOperator  # Airflow 3
except ImportError:
    from airflow.operators.bash import BashOperator  # Airflow 2

JOB = "/opt/mistral-batch/jobs/classify.toml --set out=/var/lib/mistral-batch --set date={{ ds }}"

with DAG(
    dag_id="ticket_labels",
    schedule="15 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=True,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5), "retry_exponential_backoff": True},
):
    check = BashOperator(task_id="check", bash_command=f"mistral-batch check {JOB}", retries=0)
    classify = BashOperator(
        task_id="classify",
        bash_command=f"mistral-batch run {JOB} --report /var/lib/mistral-batch/classify-{{{{ ds }}}}.json --progress plain",
        # Past this Airflow sends SIGTERM, and the next try resumes.
        execution_timeout=timedelta(hours=6),
    )
    check >> classify
