//! The report's pictures, as SVG text.

use std::fmt::Display;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::error::{Error, Result};
use crate::eval::metrics::calibration::ReliabilityBin;

const BLUE: RGBColor = RGBColor(31, 90, 166);
const ORANGE: RGBColor = RGBColor(200, 90, 20);
const GRAY: RGBColor = RGBColor(120, 120, 120);
const PALE: RGBColor = RGBColor(222, 226, 232);
const SOFT: RGBColor = RGBColor(165, 172, 184);
const INK: RGBColor = RGBColor(40, 44, 52);
const FONT: &str = "sans-serif";
/// Width of a picture that has a line of the page for itself.
const WIDE: u32 = 720;
/// Width and height of one that shares it.
const SQUARE: u32 = 350;

/// A value with its interval.
#[derive(Debug, Clone)]
pub struct Point {
    pub label: String,
    pub value: f64,
    pub interval: Option<(f64, f64)>,
}

/// A cell's speed, and its value.
#[derive(Debug, Clone)]
pub struct SpeedPoint {
    pub tokens_per_second: f64,
    pub point: Point,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Values with their intervals, one a line, the first on top.
///
/// # Errors
/// [`Error::Internal`] when it cannot be drawn.
pub fn intervals(axis: &str, points: &[Point]) -> Result<String> {
    let known: Vec<&Point> = points.iter().filter(|point| point.value.is_finite()).collect();
    let (low, high) = bounds(known.iter().flat_map(|point| extent(point)));
    let lines = points.len() as f64;
    draw(WIDE, 70 + 26 * points.len() as u32, |area| {
        let longest = points.iter().map(|point| point.label.chars().count()).max().unwrap_or(0);
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size((longest * 6 + 14) as u32)
            .build_cartesian_2d(low..high, lines - 0.5..-0.5)
            .map_err(bug)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(PALE)
            .axis_style(GRAY)
            .x_labels(6)
            .y_labels(0)
            .x_desc(axis)
            .x_label_formatter(&|value| short(*value))
            .label_style((FONT, 13, &INK))
            .draw()
            .map_err(bug)?;
        for (line, point) in points.iter().enumerate() {
            let y = line as f64;
            let (x, _) = chart.backend_coord(&(low, y));
            let (_, y_pixel) = chart.backend_coord(&(low, y));
            let style = right_aligned(13);
            area.draw(&Text::new(point.label.clone(), (x - 8, y_pixel), style)).map_err(bug)?;
            if !point.value.is_finite() {
                continue;
            }
            if let Some((from, to)) = point.interval {
                let bar = ErrorBar::new_horizontal(y, from, point.value, to, BLUE.stroke_width(2), 9);
                chart.draw_series([bar]).map_err(bug)?;
            }
            chart.draw_series([Circle::new((point.value, y), 4, BLUE.filled())]).map_err(bug)?;
        }
        Ok(())
    })
}

/// Accuracy by confidence: on the diagonal, scores are the probabilities that they claim to be.
///
/// # Errors
/// [`Error::Internal`] when it cannot be drawn.
pub fn reliability(bins: &[ReliabilityBin]) -> Result<String> {
    let filled: Vec<&ReliabilityBin> = bins.iter().filter(|bin| bin.rows > 0).collect();
    let most = filled.iter().map(|bin| bin.rows).max().unwrap_or(1) as f64;
    draw(SQUARE, SQUARE, |area| {
        let axes = ("confidence (score of the label)", "accuracy (share of rows)");
        let mut chart = framed(area, 0.0..1.05, 0.0..1.05, axes)?;
        chart.draw_series(DashedLineSeries::new([(0.0, 0.0), (1.0, 1.0)], 5, 4, GRAY.stroke_width(1))).map_err(bug)?;
        let line = filled.iter().map(|bin| (bin.confidence, bin.accuracy));
        chart.draw_series(LineSeries::new(line, BLUE.stroke_width(2))).map_err(bug)?;
        // A circle's area is its share of the rows.
        let circles = filled.iter().map(|bin| {
            let radius = 3.0 + 9.0 * (bin.rows as f64 / most).sqrt();
            Circle::new((bin.confidence, bin.accuracy), radius as i32, BLUE.mix(0.45).filled())
        });
        chart.draw_series(circles).map_err(bug)?;
        Ok(())
    })
}

/// Values over speeds, with intervals; `axis` names the value.
///
/// # Errors
/// [`Error::Internal`] when it cannot be drawn.
pub fn speed_and_value(axis: &str, points: &[SpeedPoint]) -> Result<String> {
    let known: Vec<&SpeedPoint> =
        points.iter().filter(|point| point.point.value.is_finite() && point.tokens_per_second.is_finite()).collect();
    let (low, high) = bounds(known.iter().flat_map(|point| extent(&point.point)));
    let fastest = known.iter().map(|point| point.tokens_per_second).fold(1.0, f64::max);
    draw(SQUARE, SQUARE, |area| {
        let mut chart = framed(area, 0.0..1.1 * fastest, low..high, ("speed (tokens/s)", axis))?;
        let bars =
            known.iter().filter_map(|point| Some((point.tokens_per_second, point.point.value, point.point.interval?)));
        let bars =
            bars.map(|(x, value, (from, to))| ErrorBar::new_vertical(x, from, value, to, SOFT.stroke_width(1), 6));
        chart.draw_series(bars).map_err(bug)?;
        let dots =
            known.iter().map(|point| Circle::new((point.tokens_per_second, point.point.value), 4, ORANGE.filled()));
        chart.draw_series(dots).map_err(bug)?;
        // Numbers come last, so that no bar hides them.
        let places: Vec<Pixel> =
            known.iter().map(|point| chart.backend_coord(&(point.tokens_per_second, point.point.value))).collect();
        let labels: Vec<&str> = known.iter().map(|point| point.point.label.as_str()).collect();
        let (width, height) = area.dim_in_pixel();
        for (label, place) in labels.iter().zip(label_places(&places, &labels, (width as i32, height as i32))) {
            let Some(place) = place else { continue };
            let style = (FONT, LABEL_SIZE as u32).into_font().color(&INK);
            area.draw(&Text::new((*label).to_owned(), place, style)).map_err(bug)?;
        }
        Ok(())
    })
}

type Pixel = (i32, i32);

/// Height of a dot's label, in pixels.
const LABEL_SIZE: i32 = 13;

/// Where each dot's label begins (left, top), so that it hides neither a dot nor another label; `None` where it finds no
/// place within `size`.
fn label_places(dots: &[Pixel], labels: &[&str], size: Pixel) -> Vec<Option<Pixel>> {
    /// Half a dot's width, with some air.
    const DOT: i32 = 5;
    type Box = (Pixel, Pixel);
    let overlap = |a: &Box, b: &Box| a.0.0 < b.1.0 && b.0.0 < a.1.0 && a.0.1 < b.1.1 && b.0.1 < a.1.1;
    let mut taken: Vec<Box> = dots.iter().map(|(x, y)| ((x - DOT, y - DOT), (x + DOT, y + DOT))).collect();
    let mut places = Vec::new();
    for ((x, y), label) in dots.iter().zip(labels) {
        // Digits are about as wide as this; letters are narrower.
        let width = label.chars().count() as i32 * 8;
        let (right, left, middle) = (x + DOT + 2, x - DOT - 2 - width, x - width / 2);
        let (above, level, below) = (y - DOT - LABEL_SIZE, y - LABEL_SIZE / 2, y + DOT - 1);
        let candidates = [
            (right, above),
            (right, level),
            (right, below),
            (middle, above - 2),
            (middle, below + 3),
            (left, above),
            (left, level),
            (left, below),
        ];
        let free = candidates.into_iter().find(|&(left, top)| {
            let place = ((left, top), (left + width, top + LABEL_SIZE));
            left >= 0
                && top >= 0
                && left + width <= size.0
                && top + LABEL_SIZE <= size.1
                && !taken.iter().any(|other| overlap(other, &place))
        });
        if let Some((left, top)) = free {
            taken.push(((left, top), (left + width, top + LABEL_SIZE)));
        }
        places.push(free);
    }
    places
}

fn framed<'a, 'b>(
    area: &'a Area<'b>,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    (x_axis, y_axis): (&str, &str),
) -> Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(20)
        .x_label_area_size(42)
        .y_label_area_size(58)
        .build_cartesian_2d(x, y)
        .map_err(bug)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(PALE)
        .axis_style(GRAY)
        .x_labels(6)
        .y_labels(6)
        .x_desc(x_axis)
        .y_desc(y_axis)
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| short(*value))
        .label_style((FONT, 13, &INK))
        .draw()
        .map_err(bug)?;
    Ok(chart)
}

fn right_aligned(size: u32) -> TextStyle<'static> {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    TextStyle::from((FONT, size).into_font()).color(&INK).pos(Pos::new(HPos::Right, VPos::Center))
}

fn draw(width: u32, height: u32, paint: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        paint(&area)?;
        area.present().map_err(bug)?;
    }
    Ok(svg)
}

/// Drawing into memory fails on wrong coordinates only.
fn bug(error: impl Display) -> Error {
    Error::Internal(format!("the report's plot: {error}"))
}

fn extent(point: &Point) -> [f64; 3] {
    let (low, high) = point.interval.unwrap_or((point.value, point.value));
    [low, point.value, high]
}

/// Both ends of an axis with some air around the values.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return (0.0, 1.0);
    }
    let air = match (high - low) * 0.08 {
        0.0 => (high.abs() * 0.05).max(0.01),
        air => air,
    };
    (low - air, high + air)
}

/// A number of an axis in few characters.
fn short(value: f64) -> String {
    let rounded = match value.abs() {
        0.0 => return "0".to_owned(),
        size if size >= 1e7 => return format!("{value:.1e}"),
        size if size >= 1000.0 => return format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.001 => format!("{value:.3}"),
        _ => return format!("{value:.1e}"),
    };
    rounded.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(label: &str, value: f64, interval: Option<(f64, f64)>) -> Point {
        Point { label: label.to_owned(), value, interval }
    }

    #[test]
    fn plots_hold_their_points_and_escape_their_labels() {
        let points =
            [point("0 <b>&", 0.5, Some((0.4, 0.6))), point("1", f64::NAN, None), point("2", 0.9, Some((0.9, 0.9)))];
        let svg = intervals("accuracy", &points).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        // Two known points, and the dot in the middle of each one's error bar.
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(!svg.contains("<b>"), "a label became markup");
        let speeds = points.map(|point| SpeedPoint { tokens_per_second: 10.0, point });
        assert_eq!(speed_and_value("accuracy", &speeds).unwrap().matches("<circle").count(), 4);
        assert!(intervals("nothing", &[]).is_ok());
    }

    #[test]
    fn labels_hide_no_dot_and_no_label() {
        let dots = [(100, 100), (104, 100), (100, 106), (340, 100), (101, 101)];
        let places = label_places(&dots, &["0", "1", "2", "33", "4"], (350, 350));
        assert_eq!(places[0].map(|(left, _)| left > 100), Some(true));
        assert!(places[3].is_some_and(|(left, _)| left + 16 <= 350), "it stays within the picture");
        let boxes: Vec<_> = places.iter().flatten().collect();
        assert!(boxes.len() >= 4);
        for (place, a) in boxes.iter().enumerate() {
            for b in &boxes[place + 1..] {
                assert!((a.0 - b.0).abs() >= 8 || (a.1 - b.1).abs() >= LABEL_SIZE, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn empty_bins_are_not_drawn() {
        let bin = ReliabilityBin { rows: 3, confidence: 0.7, accuracy: 0.5 };
        let svg = reliability(&[ReliabilityBin::default(), bin]).unwrap();
        assert_eq!(svg.matches("<circle").count(), 1);
    }

    #[test]
    fn axis_numbers_are_short() {
        let texts = [0.0, 0.5, 0.9125, 12.5, 100_000.0, 3.2e9, -0.25, 1e-5].map(short);
        assert_eq!(texts, ["0", "0.5", "0.912", "12.5", "100000", "3.2e9", "-0.25", "1.0e-5"]);
    }
}
