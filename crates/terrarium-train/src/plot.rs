//! Curves of a run from its log, as PNG and SVG. Needs no fonts of the system: a small one comes along.

use std::path::{Path, PathBuf};
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use serde_json::Value;

use crate::TrainError;

/// ASCII of Noto Sans (SIL Open Font Licence, see `assets/NotoSans-OFL.txt`).
static FONT: &[u8] = include_bytes!("../assets/NotoSans-Regular-ascii.ttf");

const SIZE: (u32, u32) = (1280, 960);
const INK: RGBColor = RGBColor(45, 52, 64);
const FAINT: RGBColor = RGBColor(170, 196, 226);
const BLUE: RGBColor = RGBColor(31, 98, 173);
const ORANGE: RGBColor = RGBColor(222, 107, 22);
const GREEN: RGBColor = RGBColor(46, 134, 87);
const RED: RGBColor = RGBColor(186, 61, 74);
const PURPLE: RGBColor = RGBColor(112, 83, 160);
const GRID: RGBColor = RGBColor(228, 231, 236);

type Points = Vec<(f64, f64)>;

/// Series of a log by step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curves {
    /// Training loss.
    pub loss: Points,
    /// Validation loss.
    pub valid: Points,
    /// Learning rate.
    pub lr: Points,
    /// Gradient norm.
    pub grad_norm: Points,
    /// Tokens per second.
    pub speed: Points,
}

impl Curves {
    /// Reads `log.jsonl`. A last line cut short is left out.
    ///
    /// # Errors
    /// When there is no log, or nothing in it.
    pub fn read(run_dir: &Path) -> Result<Self, TrainError> {
        let path = run_dir.join(crate::log::FILE);
        let text = std::fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let mut curves = Self::default();
        for value in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let Some(step) = value.get("step").and_then(Value::as_f64) else { continue };
            let series = [
                ("loss", &mut curves.loss),
                ("valid_loss", &mut curves.valid),
                ("lr", &mut curves.lr),
                ("grad_norm", &mut curves.grad_norm),
                ("tokens_per_s", &mut curves.speed),
            ];
            for (key, points) in series {
                points.extend(value.get(key).and_then(Value::as_f64).map(|y| (step, y)));
            }
        }
        if curves.loss.is_empty() {
            return Err(TrainError::Plot { path, reason: "the log holds no steps yet".to_string() });
        }
        Ok(curves)
    }
}

/// Draws the curves of `run_dir` to `out`: a `.png` or `.svg` file, or both as `curves.*` in a directory.
///
/// # Errors
/// When there is no log, the ending is unknown, or the file cannot be written.
pub fn plot(run_dir: &Path, out: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let curves = Curves::read(run_dir)?;
    let title = run_dir.canonicalize().ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned())).unwrap_or_default();
    let files = match out.extension().and_then(|ending| ending.to_str()) {
        Some("png" | "svg") => vec![out.to_path_buf()],
        _ if out.is_dir() => vec![out.join("curves.png"), out.join("curves.svg")],
        _ => {
            return Err(TrainError::Plot {
                path: out.to_path_buf(),
                reason: "name a .png or .svg file, or an existing directory".to_string(),
            });
        }
    };
    for file in &files {
        let bytes = if file.extension().is_some_and(|ending| ending == "svg") { svg(&curves, &title) } else { png(&curves, &title) };
        let bytes = bytes.map_err(|reason| TrainError::Plot { path: file.clone(), reason })?;
        terrarium_runtime::write_atomic(file, &bytes)?;
    }
    Ok(files)
}

fn register_font() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if plotters::style::register_font("sans-serif", FontStyle::Normal, FONT).is_err() {
            log::warn!("the embedded font cannot be read");
        }
    });
}

fn svg(curves: &Curves, title: &str) -> Result<Vec<u8>, String> {
    register_font();
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&root, curves, title).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(text.into_bytes())
}

fn png(curves: &Curves, title: &str) -> Result<Vec<u8>, String> {
    register_font();
    // The encoder writes to a path only.
    let file = tempfile::Builder::new().suffix(".png").tempfile().map_err(|error| error.to_string())?;
    {
        let root = BitMapBackend::new(file.path(), SIZE).into_drawing_area();
        draw(&root, curves, title).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    std::fs::read(file.path()).map_err(|error| error.to_string())
}

type Outcome<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

fn draw<DB: DrawingBackend>(root: &DrawingArea<DB, Shift>, curves: &Curves, title: &str) -> Outcome<DB> {
    root.fill(&WHITE)?;
    let root = root.margin(14, 14, 14, 22);
    let (head, body) = root.split_vertically(46);
    head.draw_text(title, &("sans-serif", 26).into_font().color(&INK), (14, 6))?;
    let (top, bottom) = body.split_vertically(540);
    losses(&top, curves)?;
    let panels = bottom.split_evenly((1, 3));
    let rest = [
        ("Learning rate", &curves.lr, GREEN, exponent as fn(&f64) -> String),
        ("Gradient norm", &curves.grad_norm, RED, short),
        ("Tokens per second", &curves.speed, PURPLE, short),
    ];
    for (panel, (name, points, color, format)) in panels.iter().zip(rest) {
        single(panel, name, points, color, format)?;
    }
    Ok(())
}

fn losses<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>, curves: &Curves) -> Outcome<DB> {
    let smooth = smoothed(&curves.loss);
    // The first steps of a new model tower over everything after; the curve may leave the picture there.
    let (low, high) = bounds(curves.loss.iter().chain(&curves.valid), 0.995);
    let mut chart = frame(area, "Loss (nats per token)", range_x(&curves.loss), low..high)?;
    mesh(&mut chart, Some("Step"), short)?;
    let line = |points: &Points| LineSeries::new(points.clone(), ShapeStyle::from(&FAINT).stroke_width(1));
    let last = |points: &Points| points.last().map_or(String::new(), |(_, y)| format!(" {y:.3}"));
    chart.draw_series(line(&curves.loss))?.label("train").legend(|(x, y)| swatch(x, y, FAINT));
    let bold = ShapeStyle::from(&BLUE).stroke_width(2);
    chart
        .draw_series(LineSeries::new(smooth.clone(), bold))?
        .label(format!("train, smoothed{}", last(&smooth)))
        .legend(|(x, y)| swatch(x, y, BLUE));
    if !curves.valid.is_empty() {
        chart.draw_series(LineSeries::new(curves.valid.clone(), ShapeStyle::from(&ORANGE).stroke_width(2)))?;
        chart
            .draw_series(curves.valid.iter().map(|point| Circle::new(*point, 4, ORANGE.filled())))?
            .label(format!("validation{}", last(&curves.valid)))
            .legend(|(x, y)| swatch(x, y, ORANGE));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(14)
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
        .label_font(("sans-serif", 17).into_font().color(&INK))
        .draw()
}

fn swatch<DB: DrawingBackend>(x: i32, y: i32, color: RGBColor) -> DynElement<'static, DB, (i32, i32)> {
    Rectangle::new([(x, y - 2), (x + 18, y + 2)], color.filled()).into_dyn()
}

fn single<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    name: &str,
    points: &Points,
    color: RGBColor,
    format: fn(&f64) -> String,
) -> Outcome<DB> {
    let (low, high) = bounds(points.iter(), 0.99);
    let mut chart = frame(area, name, range_x(points), low.min(0.0).max(low - 1.0)..high)?;
    mesh(&mut chart, None, format)?;
    chart.draw_series(LineSeries::new(points.clone(), ShapeStyle::from(&color).stroke_width(2)))?;
    Ok(())
}

type Axes = Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>;

fn frame<'a, DB: DrawingBackend>(
    area: &'a DrawingArea<DB, Shift>,
    name: &str,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
) -> Result<ChartContext<'a, DB, Axes>, DrawingAreaErrorKind<DB::ErrorType>> {
    ChartBuilder::on(area)
        .caption(name, ("sans-serif", 20).into_font().color(&INK))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(66)
        .build_cartesian_2d(x, y)
}

fn mesh<DB: DrawingBackend>(chart: &mut ChartContext<'_, DB, Axes>, x: Option<&str>, format: fn(&f64) -> String) -> Outcome<DB> {
    let wide = x.is_some();
    let step = |value: &f64| if value.fract() == 0.0 { short(value) } else { String::new() };
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK.mix(0.5))
        .x_labels(if wide { 10 } else { 4 })
        .y_labels(if wide { 8 } else { 5 })
        .x_desc(x.unwrap_or("Step"))
        .x_label_formatter(&step)
        .y_label_formatter(&format)
        .label_style(("sans-serif", 15).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 16).into_font().color(&INK))
        .draw()
}

fn range_x(points: &Points) -> std::ops::Range<f64> {
    let first = points.first().map_or(0.0, |(x, _)| *x);
    let last = points.last().map_or(1.0, |(x, _)| *x);
    if last > first { first..last } else { first - 0.5..first + 0.5 }
}

/// Bounds of most of the values, with some air.
fn bounds<'a>(points: impl Iterator<Item = &'a (f64, f64)>, share: f64) -> (f64, f64) {
    let mut values: Vec<f64> = points.map(|(_, y)| *y).filter(|y| y.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let (Some(low), Some(high)) = (values.first(), values.get(((values.len().max(1) - 1) as f64 * share).round() as usize)) else {
        return (0.0, 1.0);
    };
    let air = if high > low { 0.06 * (high - low) } else { 0.5 * high.abs().max(1e-9) };
    (low - air, high + air)
}

/// Exponential moving average without the bias of its start, about a fiftieth of the run wide.
fn smoothed(points: &Points) -> Points {
    let keep = 1.0 - (50.0 / points.len().max(1) as f64).clamp(0.02, 0.5);
    let (mut sum, mut weight) = (0.0, 0.0);
    let next = |(x, y): &(f64, f64)| {
        sum = keep * sum + y;
        weight = keep * weight + 1.0;
        (*x, sum / weight)
    };
    points.iter().map(next).collect()
}

/// `1500` as `1.5k`, `0.25` as it is.
fn short(value: &f64) -> String {
    let (scaled, unit) = match value.abs() {
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e4 => (value / 1e3, "k"),
        _ => (*value, ""),
    };
    let text = format!("{scaled:.3}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

fn exponent(value: &f64) -> String {
    if *value == 0.0 { "0".to_string() } else { format!("{value:.1e}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    fn run_dir(steps: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut text = String::new();
        for step in 1..=steps {
            let x = step as f64 / steps as f64;
            let noise = ((step * 7919) % 101) as f64 / 500.0;
            let loss = 1.4 + 3.0 * (-4.0 * x).exp() + noise;
            let lr = 1e-3 * if x < 0.1 { x * 10.0 } else { 0.5 + 0.5 * (3.14 * x).cos() };
            let (norm, speed) = (0.8 + noise + 3.0 * (-20.0 * x).exp(), 2400.0 + 800.0 * noise);
            writeln!(text, r#"{{"step":{step},"loss":{loss},"lr":{lr},"grad_norm":{norm},"tokens_per_s":{speed}}}"#).unwrap();
            if step % 50 == 0 {
                writeln!(text, r#"{{"step":{step},"valid_loss":{}}}"#, loss + 0.1 - noise).unwrap();
            }
        }
        text.push_str("{\"step\":");
        std::fs::write(dir.path().join(crate::log::FILE), text).unwrap();
        dir
    }

    #[test]
    fn curves_are_drawn_without_system_fonts() {
        let dir = run_dir(500);
        let out = std::env::var_os("TERRARIUM_PLOT_OUT").map_or(dir.path().to_path_buf(), PathBuf::from);
        let files = plot(dir.path(), &out).unwrap();
        let png = std::fs::read(&files[0]).unwrap();
        assert!(png.starts_with(b"\x89PNG") && png.len() > 20_000, "{} bytes", png.len());
        let svg = std::fs::read_to_string(&files[1]).unwrap();
        for text in ["<svg", "Gradient norm", "validation", "Learning rate"] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn one_step_and_no_step_do_not_break_it() {
        let dir = run_dir(1);
        plot(dir.path(), dir.path()).unwrap();
        std::fs::write(dir.path().join(crate::log::FILE), "").unwrap();
        assert!(plot(dir.path(), dir.path()).unwrap_err().to_string().contains("no steps"));
        assert!(plot(&dir.path().join("absent"), dir.path()).unwrap_err().to_string().contains("log.jsonl"));
    }

    #[test]
    fn numbers_are_short() {
        let texts: Vec<String> = [1500.0, 15_000.0, 0.25, 2e6, 3.0].iter().map(short).collect();
        assert_eq!(texts, ["1500", "15k", "0.25", "2M", "3"]);
    }
}
