//! Curves of a run from its log, and figures of series, as PNG and SVG. Needs no fonts of the system: a small one comes along.

mod figure;

use std::path::{Path, PathBuf};
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use serde_json::Value;

use crate::TrainError;

pub use figure::{Figure, Panel, Scale, Series};

/// ASCII of Noto Sans (SIL Open Font Licence, see `assets/NotoSans-OFL.txt`).
static FONT: &[u8] = include_bytes!("../assets/NotoSans-Regular-ascii.ttf");

const SIZE: (u32, u32) = (1280, 960);
const INK: RGBColor = RGBColor(45, 52, 64);
const FAINT: RGBColor = RGBColor(170, 196, 226);
const BLUE: RGBColor = RGBColor(31, 98, 173);
const ORANGE: RGBColor = RGBColor(222, 107, 22);
const GREEN: RGBColor = RGBColor(46, 134, 87);
const RED: RGBColor = RGBColor(186, 61, 74);
const PINK: RGBColor = RGBColor(233, 190, 196);
const LILAC: RGBColor = RGBColor(206, 196, 226);
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
    write(&Run { curves: &curves, title: &title }, &files)?;
    Ok(files)
}

/// Something that fits on a page of [`SIZE`].
trait Drawing {
    fn draw<DB: DrawingBackend>(&self, picture: Picture, root: &DrawingArea<DB, Shift>) -> Outcome<DB>;
}

/// The curves of a run under its name.
struct Run<'a> {
    curves: &'a Curves,
    title: &'a str,
}

impl Drawing for Run<'_> {
    fn draw<DB: DrawingBackend>(&self, picture: Picture, root: &DrawingArea<DB, Shift>) -> Outcome<DB> {
        picture.draw(root, self.curves, self.title)
    }
}

/// Writes a drawing to `.svg` files and to others as PNG.
fn write(drawing: &impl Drawing, files: &[PathBuf]) -> Result<(), TrainError> {
    for file in files {
        let bytes = if file.extension().is_some_and(|ending| ending == "svg") { svg(drawing) } else { png(drawing) };
        let bytes = bytes.map_err(|reason| TrainError::Plot { path: file.clone(), reason })?;
        terrarium_runtime::write_atomic(file, &bytes)?;
    }
    Ok(())
}

fn register_font() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if plotters::style::register_font("sans-serif", FontStyle::Normal, FONT).is_err() {
            log::warn!("the embedded font cannot be read");
        }
    });
}

fn svg(drawing: &impl Drawing) -> Result<Vec<u8>, String> {
    register_font();
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        drawing.draw(Picture { scale: 1 }, &root).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(text.into_bytes())
}

fn png(drawing: &impl Drawing) -> Result<Vec<u8>, String> {
    register_font();
    // The encoder writes to a path only.
    let file = tempfile::Builder::new().suffix(".png").tempfile().map_err(|error| error.to_string())?;
    {
        // Lines are drawn without smoothing: twice the size hides it.
        let root = BitMapBackend::new(file.path(), (2 * SIZE.0, 2 * SIZE.1)).into_drawing_area();
        drawing.draw(Picture { scale: 2 }, &root).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    std::fs::read(file.path()).map_err(|error| error.to_string())
}

type Outcome<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// Draws with every length multiplied.
#[derive(Clone, Copy)]
struct Picture {
    scale: u32,
}

impl Picture {
    fn px(self, length: u32) -> u32 {
        self.scale * length
    }

    fn font(self, size: u32) -> TextStyle<'static> {
        ("sans-serif", self.px(size)).into_font().color(&INK)
    }

    fn stroke(self, color: RGBColor, width: u32) -> ShapeStyle {
        ShapeStyle::from(&color).stroke_width(self.px(width))
    }

    fn draw<DB: DrawingBackend>(self, root: &DrawingArea<DB, Shift>, curves: &Curves, title: &str) -> Outcome<DB> {
        let body = self.page(root, title)?;
        let (top, bottom) = body.split_vertically(self.px(540));
        self.losses(&top, curves)?;
        let panels = bottom.split_evenly((1, 3));
        let rest = [
            ("Learning rate", &curves.lr, (GREEN, GREEN), exponent as fn(&f64) -> String),
            ("Gradient norm", &curves.grad_norm, (PINK, RED), short),
            ("Tokens per second", &curves.speed, (LILAC, PURPLE), short),
        ];
        for (panel, (name, points, colors, format)) in panels.iter().zip(rest) {
            self.single(panel, name, points, colors, format)?;
        }
        Ok(())
    }

    /// A white page with a title; gives what is below it.
    fn page<DB: DrawingBackend>(
        self,
        root: &DrawingArea<DB, Shift>,
        title: &str,
    ) -> Result<DrawingArea<DB, Shift>, DrawingAreaErrorKind<DB::ErrorType>> {
        root.fill(&WHITE)?;
        let (edge, right) = (self.px(14), self.px(22));
        let root = root.margin(edge, edge, edge, right);
        let (head, body) = root.split_vertically(self.px(46));
        head.draw_text(title, &self.font(26), (self.px(14) as i32, self.px(6) as i32))?;
        Ok(body)
    }

    fn losses<DB: DrawingBackend>(self, area: &DrawingArea<DB, Shift>, curves: &Curves) -> Outcome<DB> {
        let smooth = smoothed(&curves.loss);
        // The first steps of a new model may tower over everything after.
        let range = bounds(curves.loss.iter().chain(&curves.valid), 0.0, 0.995);
        let mut chart = self.frame(area, "Loss (nats per token)", range_x(&curves.loss), range)?;
        self.mesh(&mut chart, true, short)?;
        let last = |points: &Points| points.last().map_or(String::new(), |(_, y)| format!(" {y:.3}"));
        let swatch = |color: RGBColor| {
            move |(x, y)| Rectangle::new([(x, y - self.px(2) as i32), (x + self.px(18) as i32, y + self.px(2) as i32)], color.filled())
        };
        chart.draw_series(LineSeries::new(within(&curves.loss, range), self.stroke(FAINT, 1)))?.label("train").legend(swatch(FAINT));
        let bold = LineSeries::new(within(&smooth, range), self.stroke(BLUE, 2));
        chart.draw_series(bold)?.label(format!("train, smoothed{}", last(&smooth))).legend(swatch(BLUE));
        if !curves.valid.is_empty() {
            let valid = within(&curves.valid, range);
            chart.draw_series(LineSeries::new(valid.clone(), self.stroke(ORANGE, 2)))?;
            chart
                .draw_series(valid.into_iter().map(|point| Circle::new(point, self.px(4), ORANGE.filled())))?
                .label(format!("validation{}", last(&curves.valid)))
                .legend(swatch(ORANGE));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(self.px(10))
            .legend_area_size(self.px(28))
            .background_style(WHITE.mix(0.9))
            .border_style(GRID)
            .label_font(self.font(17))
            .draw()
    }

    /// One curve, faint as it is and bold as it runs on average.
    fn single<DB: DrawingBackend>(
        self,
        area: &DrawingArea<DB, Shift>,
        name: &str,
        points: &Points,
        (faint, bold): (RGBColor, RGBColor),
        format: fn(&f64) -> String,
    ) -> Outcome<DB> {
        let range = bounds(points.iter(), 0.005, 0.995);
        let mut chart = self.frame(area, name, range_x(points), range)?;
        self.mesh(&mut chart, false, format)?;
        if faint != bold {
            chart.draw_series(LineSeries::new(within(points, range), self.stroke(faint, 1)))?;
        }
        let line = if faint == bold { points.clone() } else { smoothed(points) };
        chart.draw_series(LineSeries::new(within(&line, range), self.stroke(bold, 2)))?;
        Ok(())
    }

    fn frame<'a, DB: DrawingBackend>(
        self,
        area: &'a DrawingArea<DB, Shift>,
        name: &str,
        x: std::ops::Range<f64>,
        (low, high): (f64, f64),
    ) -> Result<ChartContext<'a, DB, Axes>, DrawingAreaErrorKind<DB::ErrorType>> {
        ChartBuilder::on(area)
            .caption(name, self.font(20))
            .margin(self.px(12))
            .x_label_area_size(self.px(44))
            .y_label_area_size(self.px(66))
            .build_cartesian_2d(x, low..high)
    }

    fn mesh<DB: DrawingBackend>(self, chart: &mut ChartContext<'_, DB, Axes>, wide: bool, format: fn(&f64) -> String) -> Outcome<DB> {
        let step = |value: &f64| if value.fract() == 0.0 { short(value) } else { String::new() };
        let light = self.stroke(GRID, 1);
        chart
            .configure_mesh()
            .bold_line_style(light)
            .light_line_style(TRANSPARENT)
            .axis_style(ShapeStyle::from(&INK.mix(0.5)).stroke_width(self.px(1)))
            .set_all_tick_mark_size(self.px(4))
            .x_labels(if wide { 10 } else { 4 })
            .y_labels(if wide { 8 } else { 5 })
            .x_desc("Step")
            .x_label_formatter(&step)
            .y_label_formatter(&format)
            .label_style(self.font(15))
            .axis_desc_style(self.font(16))
            .draw()
    }
}

type Axes = Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>;

fn range_x(points: &Points) -> std::ops::Range<f64> {
    let first = points.first().map_or(0.0, |(x, _)| *x);
    let last = points.last().map_or(1.0, |(x, _)| *x);
    if last > first { first..last } else { first - 0.5..first + 0.5 }
}

/// Bounds of the values between two quantiles, with some air.
fn bounds<'a>(points: impl Iterator<Item = &'a (f64, f64)>, from: f64, to: f64) -> (f64, f64) {
    let mut values: Vec<f64> = points.map(|(_, y)| *y).filter(|y| y.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get((values.len().saturating_sub(1) as f64 * share).round() as usize).copied();
    let (Some(low), Some(high)) = (at(from), at(to)) else { return (0.0, 1.0) };
    let air = if high > low { 0.06 * (high - low) } else { 0.5 * high.abs().max(1e-9) };
    (low - air, high + air)
}

/// The points, held inside the frame: the charts do not clip.
fn within(points: &Points, (low, high): (f64, f64)) -> Points {
    points.iter().filter(|(_, y)| y.is_finite()).map(|(x, y)| (*x, y.clamp(low, high))).collect()
}

/// Average over a window around each point, about a twenty-fifth of the run wide. At the start, where curves are steep, it narrows
/// and stays centred; at the end, where they are flat, it only looks back.
fn smoothed(points: &Points) -> Points {
    let half = points.len() / 50 + 1;
    let sums: Vec<f64> = std::iter::once(0.0)
        .chain(points.iter().scan(0.0, |sum, (_, y)| {
            *sum += y;
            Some(*sum)
        }))
        .collect();
    let mean = |(at, (x, _)): (usize, &(f64, f64))| {
        let back = half.min(at);
        let (from, to) = (at - back, at + back.min(points.len() - 1 - at) + 1);
        (*x, (sums[to] - sums[from]) / (to - from) as f64)
    };
    points.iter().enumerate().map(mean).collect()
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
            let lr = 1e-3 * if x < 0.1 { x * 10.0 } else { 0.5 + 0.5 * (3.0 * x).cos() };
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
