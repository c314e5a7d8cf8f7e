//! `report.html`: everything on one page, without anything from outside it.

mod plots;

use std::fmt::Write;

use serde_json::Value;

use super::results::{Comparison, MeasuredValue, SweepResults, TaskRun, setting_text};
use super::scoring::{Better, Measure};
use crate::error::Result;
use plots::{Point, SpeedPoint};

/// Cells of a task whose confusion matrix, reliability and classes are shown: the best ones.
const DETAILED_CELLS: usize = 3;
/// Comparisons of a task that are shown; those with the smallest p-values.
const SHOWN_COMPARISONS: usize = 40;

const STYLE: &str = include_str!("report.css");

/// The report as HTML.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn html(results: &SweepResults) -> Result<String> {
    let mut page = String::new();
    let title = escape(&results.title);
    page += "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n";
    page += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
    let _ = write!(page, "<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n");
    let mut tasks: Vec<&str> = Vec::new();
    for run in &results.runs {
        if !tasks.contains(&run.task.as_str()) {
            tasks.push(&run.task);
        }
    }
    let _ = writeln!(
        page,
        "<p class=\"about\">{} task(s), {} run(s), mistral-batch {}. {} All values are in <code>runs.parquet</code>, \
         all comparisons in <code>comparisons.parquet</code>.</p>",
        tasks.len(),
        results.runs.len(),
        env!("CARGO_PKG_VERSION"),
        intervals_in_words(results),
    );
    for task in tasks {
        let runs: Vec<&TaskRun> = results.runs.iter().filter(|run| run.task == task).collect();
        let comparisons: Vec<&Comparison> = results.comparisons.iter().filter(|pair| pair.task == task).collect();
        task_section(&mut page, results, &runs, &comparisons)?;
    }
    page += "</body>\n</html>\n";
    Ok(page)
}

fn intervals_in_words(results: &SweepResults) -> String {
    let bootstrap = &results.bootstrap;
    match bootstrap.resamples {
        0 => "Without intervals.".to_owned(),
        resamples => format!(
            "Intervals hold the middle {}% of {resamples} bootstrap resamples of the rows (seed {}).",
            percent(bootstrap.confidence),
            bootstrap.seed
        ),
    }
}

fn task_section(
    page: &mut String,
    results: &SweepResults,
    runs: &[&TaskRun],
    comparisons: &[&Comparison],
) -> Result<()> {
    let Some(first) = runs.first() else { return Ok(()) };
    let keys: Vec<&String> =
        results.keys.iter().filter(|key| runs.iter().any(|run| run.settings.contains_key(*key))).collect();
    let _ = writeln!(page, "<section>\n<h2>{}</h2>", escape(&first.task));
    let _ = writeln!(page, "<p class=\"about\">{}: {}</p>", first.kind.name(), first.kind.in_words());
    summary_table(page, runs, &keys);

    let Some(headline) = first.headline() else { return Ok(()) };
    let name = headline.measure.name.replace('_', " ");
    let axis = format!("{name} ({})", unit(&headline.measure));
    let point = |run: &&TaskRun| {
        let (value, interval) = run.headline().map_or((f64::NAN, None), |value| (value.value, value.interval));
        Point { label: run.cell.to_string(), value, interval }
    };
    let labelled = |run: &&TaskRun| Point { label: label(run, &keys), ..point(run) };
    figure(
        page,
        &format!("{name} of each cell, with its interval"),
        &plots::intervals(&axis, &runs.iter().map(labelled).collect::<Vec<_>>())?,
    );
    let speeds = |run: &&TaskRun| SpeedPoint { tokens_per_second: run.cost.tokens_per_second, point: point(run) };
    let speeds: Vec<SpeedPoint> = runs.iter().map(speeds).collect();

    let best = best_first(runs);
    *page += "<div class=\"row\">\n";
    figure(page, &format!("speed and {name}; numbers are cells"), &plots::speed_and_value(&axis, &speeds)?);
    if let Some((run, bins)) = best.iter().find_map(|run| Some((run, run.reliability.as_ref()?))) {
        figure(
            page,
            &format!("reliability of cell {}; larger circles are more rows", run.cell),
            &plots::reliability(bins)?,
        );
    }
    *page += "</div>\n";
    comparison_table(page, comparisons, &name);
    for run in best.iter().take(DETAILED_CELLS) {
        details(page, run, &keys);
    }
    *page += "</section>\n";
    Ok(())
}

/// Cells by their first measure, the best first; equal ones in their order.
fn best_first<'a>(runs: &[&'a TaskRun]) -> Vec<&'a TaskRun> {
    let mut runs: Vec<&TaskRun> = runs.to_vec();
    let key = |run: &TaskRun| match run.headline() {
        Some(value) if value.measure.better == Better::Lower => value.value,
        Some(value) => -value.value,
        None => f64::NAN,
    };
    runs.sort_by(|a, b| key(a).total_cmp(&key(b)));
    runs
}

/// A cell's number and its settings, in few characters.
fn label(run: &TaskRun, keys: &[&String]) -> String {
    const LONGEST: usize = 34;
    let settings: Vec<String> = keys.iter().filter_map(|key| run.settings.get(*key)).map(short_setting).collect();
    let label = format!("{}  {}", run.cell, settings.join(" · "));
    match label.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &label[..end]),
        None => label,
    }
}

/// A setting's value; of a path its last part.
fn short_setting(value: &Value) -> String {
    let text = setting_text(value).replace(['\n', '\r'], "⏎");
    let is_path = text.contains('/') && !text.contains(' ');
    if is_path { text.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned() } else { text }
}

fn summary_table(page: &mut String, runs: &[&TaskRun], keys: &[&String]) {
    let overall = |run: &TaskRun| -> Vec<usize> {
        (0..run.values.len()).filter(|&value| run.values[value].measure.class.is_none()).collect()
    };
    let columns = runs.first().map(|run| overall(run)).unwrap_or_default();
    let best: Vec<Option<f64>> = columns.iter().map(|&column| best_value(runs, column)).collect();
    *page += "<table>\n<thead><tr><th>cell</th>";
    for key in keys {
        let _ = write!(page, "<th>{}</th>", escape(key));
    }
    *page += "<th class=\"number\">n</th>";
    for &column in &columns {
        let name = runs.first().map(|run| heading(run.values[column].measure.name)).unwrap_or_default();
        let _ = write!(page, "<th class=\"number\">{name}</th>");
    }
    *page += "<th class=\"number\">tokens/s</th></tr></thead>\n<tbody>\n";
    for run in runs {
        let _ = write!(page, "<tr><td>{}</td>", run.cell);
        for key in keys {
            let value = run.settings.get(*key);
            let (full, short) =
                (value.map(setting_text).unwrap_or_default(), value.map(short_setting).unwrap_or_default());
            let _ = write!(page, "<td class=\"setting\" title=\"{}\">{}</td>", escape(&full), escape(&short));
        }
        let left_out = match run.rows - run.compared {
            0 => String::new(),
            rows => format!("<span class=\"interval\">{rows} not compared</span>"),
        };
        let _ = write!(page, "<td class=\"number\">{}{left_out}</td>", run.compared);
        for (&column, best) in columns.iter().zip(&best) {
            let Some(value) = run.values.get(column) else { continue };
            let class = if runs.len() > 1 && *best == Some(value.value) { "number best" } else { "number" };
            let _ = write!(page, "<td class=\"{class}\">{}</td>", with_interval(value));
        }
        let _ = writeln!(page, "<td class=\"number\">{:.0}</td></tr>", run.cost.tokens_per_second);
    }
    *page += "</tbody>\n</table>\n";
}

fn best_value(runs: &[&TaskRun], column: usize) -> Option<f64> {
    let values = runs.iter().filter_map(|run| run.values.get(column)).filter(|value| !value.value.is_nan());
    match runs.first()?.values.get(column)?.measure.better {
        Better::Higher => values.map(|value| value.value).max_by(f64::total_cmp),
        Better::Lower => values.map(|value| value.value).min_by(f64::total_cmp),
        Better::Neither => None,
    }
}

fn with_interval(value: &MeasuredValue) -> String {
    let interval = value.interval.filter(|_| value.measure.better != Better::Neither);
    let interval =
        interval.map(|(low, high)| format!("<span class=\"interval\">{} – {}</span>", number(low), number(high)));
    format!("{}{}", number(value.value), interval.unwrap_or_default())
}

fn comparison_table(page: &mut String, comparisons: &[&Comparison], axis: &str) {
    let Some(first) = comparisons.first() else { return };
    let mut shown: Vec<&&Comparison> = comparisons.iter().collect();
    shown.sort_by(|a, b| a.p_value.total_cmp(&b.p_value));
    shown.truncate(SHOWN_COMPARISONS);
    let test = match first.test {
        "mcnemar_exact" => "McNemar's exact test of the rows that only one of two cells got right",
        _ => "the paired bootstrap",
    };
    let _ = write!(
        page,
        "<h3>Cells compared by {axis}</h3>\n<p class=\"about\">p-values of no difference by {test}, two-sided, not \
         corrected for the number of pairs: of {} pairs about {:.1} fall under 0.05 by chance alone.{}</p>\n\
         <table class=\"narrow\">\n<thead><tr><th>cells</th><th class=\"number\">difference</th><th class=\"number\">p</th></tr></thead>\n<tbody>\n",
        comparisons.len(),
        comparisons.len() as f64 * 0.05,
        if shown.len() < comparisons.len() { " The smallest are shown." } else { "" },
    );
    for pair in shown {
        let p = if pair.p_value < 0.0001 { "&lt; 0.0001".to_owned() } else { format!("{:.4}", pair.p_value) };
        let class = if pair.p_value < 0.05 { "number best" } else { "number" };
        let difference =
            if pair.difference > 0.0 { format!("+{}", number(pair.difference)) } else { number(pair.difference) };
        let _ = writeln!(
            page,
            "<tr><td>{} → {}</td><td class=\"number\">{difference}</td><td class=\"{class}\">{p}</td></tr>",
            pair.first, pair.second
        );
    }
    *page += "</tbody>\n</table>\n";
}

/// Confusion matrix and classes of one cell.
fn details(page: &mut String, run: &TaskRun, keys: &[&String]) {
    let mut classes: Vec<&str> = Vec::new();
    for class in run.values.iter().filter_map(|value| value.measure.class.as_deref()) {
        if classes.last() != Some(&class) {
            classes.push(class);
        }
    }
    if classes.is_empty() {
        return;
    }
    let _ = writeln!(page, "<h3>Cell {}</h3>\n<div class=\"row\">", escape(&label(run, keys)));
    *page += "<table class=\"narrow\">\n<thead><tr><th>class</th>";
    let of = |class: &str| -> Vec<&MeasuredValue> {
        run.values.iter().filter(|value| value.measure.class.as_deref() == Some(class)).collect()
    };
    for value in of(classes[0]) {
        let _ = write!(page, "<th class=\"number\">{}</th>", value.measure.name);
    }
    *page += "</tr></thead>\n<tbody>\n";
    for class in &classes {
        let _ = write!(page, "<tr><td>{}</td>", escape(class));
        for value in of(class) {
            let _ = write!(page, "<td class=\"number\">{}</td>", with_interval(value));
        }
        *page += "</tr>\n";
    }
    *page += "</tbody>\n</table>\n";
    confusion_table(page, run);
    *page += "</div>\n";
}

fn confusion_table(page: &mut String, run: &TaskRun) {
    let Some((classes, matrix)) = &run.confusion else { return };
    *page += "<table class=\"confusion\">\n<caption>true class (rows) and predicted class (columns)</caption>\n<thead><tr><th></th>";
    for class in classes {
        let _ = write!(page, "<th>{}</th>", escape(class));
    }
    *page += "</tr></thead>\n<tbody>\n";
    for (truth, class) in classes.iter().enumerate() {
        let total: u64 = (0..classes.len()).map(|predicted| matrix.count(truth, predicted)).sum();
        let _ = write!(page, "<tr><th>{}</th>", escape(class));
        for predicted in 0..classes.len() {
            let count = matrix.count(truth, predicted);
            let share = if total == 0 { 0.0 } else { count as f64 / total as f64 };
            let color = if truth == predicted { "31,90,166" } else { "200,90,20" };
            let text = if share > 0.55 { "#fff" } else { "#222" };
            let _ = write!(page, "<td style=\"background:rgba({color},{share:.3});color:{text}\">{count}</td>");
        }
        *page += "</tr>\n";
    }
    *page += "</tbody>\n</table>\n";
}

fn figure(page: &mut String, caption: &str, svg: &str) {
    let _ = writeln!(page, "<figure>{svg}<figcaption>{}</figcaption></figure>", escape(caption));
}

/// What a task's first measure counts.
fn unit(measure: &Measure) -> &'static str {
    match measure.name {
        "accuracy" | "subset_accuracy" | "exact_match" => "share of rows",
        "acc" => "share of documents",
        _ if measure.better == Better::Lower => "lower is better",
        _ => "0 to 1",
    }
}

/// The name of a measure in few characters.
fn heading(name: &str) -> String {
    match name {
        "expected_calibration_error" => "ECE".to_owned(),
        "matthews_correlation" => "MCC".to_owned(),
        other => other.replace('_', " "),
    }
}

/// A value in few digits.
fn number(value: f64) -> String {
    match value.abs() {
        _ if value.is_nan() => "–".to_owned(),
        size if size >= 1e6 => format!("{value:.3e}"),
        size if size >= 100.0 && value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share).trim_end_matches(".0").to_owned()
}

/// Text that cannot become markup, neither between tags nor in an attribute.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}
