//! Series of measured points with error bars, in panels beside one another.

use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{BLUE, Drawing, GREEN, GRID, INK, ORANGE, Outcome, PURPLE, Picture, RED, bounds, short};
use crate::TrainError;

const TEAL: RGBColor = RGBColor(24, 140, 150);
const OLIVE: RGBColor = RGBColor(133, 125, 32);
const BROWN: RGBColor = RGBColor(128, 84, 58);
const COLORS: [RGBColor; 8] = [BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, OLIVE, BROWN];

/// Panels under a title.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figure {
    /// What it shows.
    pub title: String,
    /// From left to right, two in a row; those without points are left out.
    pub panels: Vec<Panel>,
}

/// How an axis is divided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// By powers of two; values are positive.
    Log2,
    /// By powers of ten; values are positive.
    Log10,
}

/// One pair of axes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Panel {
    /// What it shows.
    pub title: String,
    /// Name of the horizontal axis.
    pub x: String,
    /// Division of the horizontal axis.
    pub x_scale: Scale,
    /// Division of the vertical axis.
    pub y_scale: Scale,
    /// Ends of the vertical axis; by default those of the points.
    pub y_range: Option<(f64, f64)>,
    /// What is drawn, in the order of the legend.
    pub series: Vec<Series>,
}

/// Points of one colour.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// `(x, y, e)`: drawn at `y` with a bar from `y - e` to `y + e`.
    pub points: Vec<(f64, f64, f64)>,
    /// A line without markers, such as a fit; it has the colour of the series before it and no place in the legend.
    pub fit: bool,
}

impl Figure {
    /// Draws it to `STEM.png` and `STEM.svg` in `dir`. Points that an axis cannot show are left out.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, dir: &Path, stem: &str) -> Result<Vec<PathBuf>, TrainError> {
        let files = vec![dir.join(format!("{stem}.png")), dir.join(format!("{stem}.svg"))];
        super::write(self, &files)?;
        Ok(files)
    }
}

impl Drawing for Figure {
    fn draw<DB: DrawingBackend>(&self, picture: Picture, root: &DrawingArea<DB, Shift>) -> Outcome<DB> {
        let body = picture.page(root, &self.title)?;
        let drawn: Vec<&Panel> = self.panels.iter().filter(|panel| panel.series.iter().any(|series| !series.points.is_empty())).collect();
        let columns = drawn.len().clamp(1, 2);
        let areas = body.split_evenly((drawn.len().div_ceil(columns).max(1), columns));
        for (area, panel) in areas.iter().zip(drawn) {
            panel.draw(picture, area)?;
        }
        Ok(())
    }
}

impl Scale {
    /// Where a value stands on the axis, if it can.
    fn place(self, value: f64) -> Option<f64> {
        let placed = match self {
            Self::Linear => value,
            Self::Log2 => value.log2(),
            Self::Log10 => value.log10(),
        };
        placed.is_finite().then_some(placed)
    }

    /// The number at a place of the axis; K is 1024 between powers of two. Between these there is none: ticks stand on them.
    fn label(self, place: f64) -> String {
        let whole = (place - place.round()).abs() < 1e-6;
        match self {
            Self::Linear => short(&place),
            Self::Log2 if whole && place > 19.5 => format!("{}M", (place.round() - 20.0).exp2()),
            Self::Log2 if whole && place > 9.5 => format!("{}K", (place.round() - 10.0).exp2()),
            Self::Log2 if whole => short(&place.exp2()),
            Self::Log2 => String::new(),
            Self::Log10 if whole && place.abs() > 5.5 => format!("1e{place:.0}"),
            Self::Log10 => rounded(10f64.powf(place)),
        }
    }
}

/// Three digits.
fn rounded(value: f64) -> String {
    if value.abs() >= 1e6 || (value != 0.0 && value.abs() < 1e-3) {
        return format!("{value:.1e}");
    }
    let digits = 2 - value.abs().max(1e-9).log10().floor() as i32;
    let factor = 10f64.powi(digits);
    short(&((value * factor).round() / factor))
}

type Placed = (f64, f64, f64, f64);

impl Panel {
    fn placed(&self, series: &Series) -> Vec<Placed> {
        let place = |&(x, y, e): &(f64, f64, f64)| {
            let at = self.y_scale.place(y)?;
            let end = |value: f64| self.y_scale.place(value).unwrap_or(at);
            Some((self.x_scale.place(x)?, at, end(y - e), end(y + e)))
        };
        series.points.iter().filter_map(place).collect()
    }

    fn draw<DB: DrawingBackend>(&self, picture: Picture, area: &DrawingArea<DB, Shift>) -> Outcome<DB> {
        let placed: Vec<Vec<Placed>> = self.series.iter().map(|series| self.placed(series)).collect();
        let ends = |point: &Placed| [(point.0, point.2), (point.0, point.3)];
        let all: Vec<(f64, f64)> = placed.iter().flatten().flat_map(ends).collect();
        let (low, high) = match self.y_range {
            Some((low, high)) => (self.y_scale.place(low).unwrap_or(0.0), self.y_scale.place(high).unwrap_or(1.0)),
            None => bounds(all.iter(), 0.0, 1.0),
        };
        let across: Vec<(f64, f64)> = all.iter().map(|(x, _)| (0.0, *x)).collect();
        let (left, right) = bounds(across.iter(), 0.0, 1.0);
        let mut chart = picture.frame(area, &self.title, left..right, (low, high))?;
        let light = picture.stroke(GRID, 1);
        let (x_scale, y_scale) = (self.x_scale, self.y_scale);
        let ticks = if x_scale == Scale::Log2 { ((right - left).ceil() as usize + 1).clamp(2, 12) } else { 6 };
        chart
            .configure_mesh()
            .bold_line_style(light)
            .light_line_style(TRANSPARENT)
            .axis_style(ShapeStyle::from(&INK.mix(0.5)).stroke_width(picture.px(1)))
            .set_all_tick_mark_size(picture.px(4))
            .x_labels(ticks)
            .y_labels(8)
            .x_desc(self.x.as_str())
            .x_label_formatter(&|x| x_scale.label(*x))
            .y_label_formatter(&|y| y_scale.label(*y))
            .label_style(picture.font(14))
            .axis_desc_style(picture.font(16))
            .draw()?;
        let mut colors = 0;
        for (series, points) in self.series.iter().zip(&placed) {
            colors += usize::from(!series.fit);
            let color = COLORS[colors.saturating_sub(1) % COLORS.len()];
            let line = points.iter().map(|&(x, y, ..)| (x, y.clamp(low, high)));
            if series.fit {
                chart.draw_series(LineSeries::new(line, picture.stroke(color, 1)))?;
                continue;
            }
            let swatch = move |(x, y): (i32, i32)| {
                let (half, width) = (picture.px(2) as i32, picture.px(18) as i32);
                Rectangle::new([(x, y - half), (x + width, y + half)], color.filled())
            };
            chart.draw_series(LineSeries::new(line, picture.stroke(color, 2)))?.label(&series.name).legend(swatch);
            let bar = |&(x, _, from, to): &Placed| {
                PathElement::new([(x, from.clamp(low, high)), (x, to.clamp(low, high))], picture.stroke(color, 1))
            };
            chart.draw_series(points.iter().filter(|point| point.3 > point.2).map(bar))?;
            chart.draw_series(points.iter().map(|&(x, y, ..)| Circle::new((x, y.clamp(low, high)), picture.px(4), color.filled())))?;
        }
        if colors < 2 {
            return Ok(());
        }
        chart
            .configure_series_labels()
            .position(self.legend(&placed, (left, right), (low, high)))
            .margin(picture.px(8))
            .legend_area_size(picture.px(26))
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .label_font(picture.font(14))
            .draw()
    }

    /// Where the legend hides least of the lines; the corners first.
    fn legend(&self, placed: &[Vec<Placed>], (left, right): (f64, f64), (low, high): (f64, f64)) -> SeriesLabelPosition {
        use SeriesLabelPosition as At;
        // About what it takes of the panel, by its longest name and the number of its lines.
        let named = || self.series.iter().filter(|series| !series.fit);
        let longest = named().map(|series| series.name.chars().count()).max().unwrap_or(0);
        let (width, height) = ((0.1 + 0.016 * longest as f64).min(0.9), (0.05 + 0.065 * named().count() as f64).min(0.9));
        let share = |x: f64, y: f64| ((x - left) / (right - left).max(1e-9), (y - low) / (high - low).max(1e-9));
        // Points along the lines, in shares of the panel.
        let along = |points: &Vec<Placed>| -> Vec<(f64, f64)> {
            let pairs = points.windows(2).flat_map(|pair| {
                (0..=16).map(move |i| {
                    let at = f64::from(i) / 16.0;
                    (pair[0].0 + at * (pair[1].0 - pair[0].0), pair[0].1 + at * (pair[1].1 - pair[0].1))
                })
            });
            points.iter().map(|point| (point.0, point.1)).chain(pairs).map(|(x, y)| share(x, y)).collect()
        };
        let lines: Vec<(f64, f64)> = placed.iter().flat_map(along).collect();
        let places = [
            (At::UpperLeft, 0.0, 1.0),
            (At::LowerRight, 1.0, 0.0),
            (At::UpperRight, 1.0, 1.0),
            (At::LowerLeft, 0.0, 0.0),
            (At::MiddleLeft, 0.0, 0.5),
            (At::MiddleRight, 1.0, 0.5),
            (At::UpperMiddle, 0.5, 1.0),
            (At::LowerMiddle, 0.5, 0.0),
            (At::MiddleMiddle, 0.5, 0.5),
        ];
        let hidden = |x: f64, y: f64| {
            let (from_x, from_y) = (x * (1.0 - width), y * (1.0 - height));
            let inside = |(x, y): &&(f64, f64)| (from_x..=from_x + width).contains(x) && (from_y..=from_y + height).contains(y);
            lines.iter().filter(inside).count()
        };
        places.into_iter().min_by_key(|(_, x, y)| hidden(*x, *y)).map_or(At::UpperLeft, |(place, ..)| place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_show_their_series_and_survive_what_axes_cannot_show() {
        let series = |name: &str, shift: f64, fit| {
            let points = [64.0, 128.0, 256.0].map(|x: f64| (x, shift * x.log2(), 0.3));
            Series { name: name.to_string(), points: points.to_vec(), fit }
        };
        let panel = Panel {
            title: "Accuracy".into(),
            x: "Model width".into(),
            x_scale: Scale::Log2,
            series: vec![series("scan", 0.1, false), series("attention", 0.12, false), series("a fit", 0.13, true)],
            ..Panel::default()
        };
        let mut odd = Panel { y_scale: Scale::Log10, x_scale: Scale::Log10, title: "Odd".into(), ..panel.clone() };
        odd.series[0].points = vec![(0.0, 1.0, 0.0), (10.0, -1.0, 0.0), (f64::NAN, 2.0, 0.0), (100.0, 5.0, 9.0)];
        let nothing = Panel { title: "Nothing".into(), series: vec![Series::default()], ..Panel::default() };
        let figure = Figure { title: "Recall".into(), panels: vec![panel, nothing, odd, Panel::default()] };
        let dir = tempfile::tempdir().unwrap();
        let out = std::env::var_os("TERRARIUM_PLOT_OUT").map_or(dir.path().to_path_buf(), PathBuf::from);
        let files = figure.write(&out, "figure").unwrap();
        assert!(std::fs::read(&files[0]).unwrap().starts_with(b"\x89PNG"));
        let svg = std::fs::read_to_string(&files[1]).unwrap();
        for text in ["Recall", "Model width", "attention", "128"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("a fit") && !svg.contains("Nothing"));
        assert!(Figure::default().write(&out, "empty").is_ok());
    }

    #[test]
    fn labels_stand_on_powers() {
        assert_eq!([Scale::Log2.label(7.0), Scale::Log2.label(7.5), Scale::Log10.label(9.0)], ["128", "", "1e9"]);
        assert_eq!([Scale::Log2.label(14.0), Scale::Log2.label(20.0)], ["16K", "1M"]);
        assert_eq!([rounded(0.123456), rounded(251_189.0), rounded(2.0)], ["0.123", "251k", "2"]);
    }

    #[test]
    fn legends_hide_no_line_where_they_need_not() {
        let series =
            |points: [(f64, f64); 3]| Series { name: "a line".into(), points: points.map(|(x, y)| (x, y, 0.0)).to_vec(), fit: false };
        let place = |lines: Vec<Series>| {
            let panel = Panel { series: lines, ..Panel::default() };
            let placed: Vec<Vec<Placed>> = panel.series.iter().map(|series| panel.placed(series)).collect();
            format!("{:?}", panel.legend(&placed, (0.0, 1.0), (0.0, 1.0)))
        };
        let (top, floor) = ([(0.0, 0.95), (0.5, 0.95), (1.0, 0.95)], [(0.0, 0.05), (0.5, 0.05), (1.0, 0.05)]);
        let falling = [(0.0, 0.9), (0.5, 0.5), (1.0, 0.1)];
        assert_eq!(place(vec![series(top), series(floor)]), "MiddleLeft");
        assert_eq!(place(vec![series(falling)]), "UpperRight");
        assert_eq!(place(vec![series(floor)]), "UpperLeft");
    }
}
