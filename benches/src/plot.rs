//! Pictures of measurements as SVG: lines over one axis.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

/// Width and height of a picture in pixels.
const SIZE: (u32, u32) = (900, 520);
/// Colours that stay apart for colour-blind eyes (Okabe and Ito), in the order of the series.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(120, 120, 120),
];

/// One line.
#[derive(Debug, Clone, Default)]
pub struct Series {
    pub name: String,
    /// (x, y); a point whose coordinate is not finite, or not positive on a logarithmic axis, is left out.
    pub points: Vec<(f64, f64)>,
    /// For what is a limit and not a measurement.
    pub dashed: bool,
}

/// Lines as a whole SVG document.
///
/// # Errors
/// No point can be drawn, or the drawing library fails.
pub fn lines(
    title: &str,
    x_label: &str,
    y_label: &str,
    log_x: bool,
    log_y: bool,
    series: &[Series],
) -> anyhow::Result<String> {
    let usable = |p: &(f64, f64)| {
        let fits = |v: f64, log: bool| v.is_finite() && (!log || v > 0.0);
        fits(p.0, log_x) && fits(p.1, log_y)
    };
    let points = || {
        series
            .iter()
            .flat_map(|s| s.points.iter().filter(|p| usable(p)))
    };
    let (x, y) = (
        range(points().map(|p| p.0), log_x),
        range(points().map(|p| p.1), log_y),
    );
    let (Some(x), Some(y)) = (x, y) else {
        anyhow::bail!(
            "nothing to draw in \"{title}\": no finite point, or none that is positive on a logarithmic axis"
        );
    };
    let kept: Vec<Series> = series
        .iter()
        .map(|s| Series {
            points: s.points.iter().copied().filter(|p| usable(p)).collect(),
            ..s.clone()
        })
        .collect();
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let text = (title, x_label, y_label);
        let (lx, ly) = (x.clone().log_scale(), y.clone().log_scale());
        match (log_x, log_y) {
            (true, true) => draw(&area, text, lx, ly, &kept),
            (true, false) => draw(&area, text, lx, y, &kept),
            (false, true) => draw(&area, text, x, ly, &kept),
            (false, false) => draw(&area, text, x, y, &kept),
        }?;
    }
    Ok(svg)
}

/// From the smallest to the largest, with a margin; a linear axis begins at zero where nothing is negative.
fn range(values: impl Iterator<Item = f64>, log: bool) -> Option<std::ops::Range<f64>> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
        (a.min(v), b.max(v))
    });
    if low > high {
        return None;
    }
    if log {
        return Some(low / 1.3..high * 1.3);
    }
    let margin = ((high - low) * 0.05).max(high.abs() * 0.05).max(1e-9);
    Some(if low >= 0.0 { 0.0 } else { low - margin }..high + margin)
}

fn draw<X, Y>(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    (title, x_label, y_label): (&str, &str, &str),
    x: X,
    y: Y,
    series: &[Series],
) -> anyhow::Result<()>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let failed = |e: DrawingAreaErrorKind<_>| anyhow::anyhow!("drawing \"{title}\": {e}");
    area.fill(&WHITE).map_err(failed)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc(y_label)
        .x_label_formatter(&|v| short(*v))
        .y_label_formatter(&|v| short(*v))
        .light_line_style(RGBColor(235, 235, 235))
        .draw()
        .map_err(failed)?;
    for (i, line) in series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let style = colour.stroke_width(2);
        let legend = move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 18, y)], style);
        let points = line.points.iter().copied();
        if line.dashed {
            chart
                .draw_series(DashedLineSeries::new(points, 6, 4, style))
                .map_err(failed)?
                .label(&line.name)
                .legend(legend);
            continue;
        }
        chart
            .draw_series(LineSeries::new(points.clone(), style))
            .map_err(failed)?
            .label(&line.name)
            .legend(legend);
        chart
            .draw_series(points.map(|p| Circle::new(p, 3, colour.filled())))
            .map_err(failed)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .label_font(("sans-serif", 13))
        .draw()
        .map_err(failed)?;
    area.present().map_err(failed)
}

/// A number for an axis: powers of 1000 by their letter.
fn short(v: f64) -> String {
    let (scaled, unit) = match v.abs() {
        a if a >= 1e9 => (v / 1e9, "G"),
        a if a >= 1e6 => (v / 1e6, "M"),
        a if a >= 1e4 => (v / 1e3, "k"),
        _ => (v, ""),
    };
    let digits = if scaled == 0.0 {
        0
    } else {
        (2 - scaled.abs().log10().floor() as i32).clamp(0, 6)
    };
    let text = format!("{scaled:.*}", digits as usize);
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: &[(f64, f64)]) -> Series {
        Series {
            name: "gemessen".into(),
            points: points.to_vec(),
            dashed: false,
        }
    }

    #[test]
    fn a_picture_names_its_axes_and_lines_and_leaves_out_what_it_cannot_place() {
        let limit = Series {
            dashed: true,
            name: "floor".into(),
            ..series(&[(1.0, 0.5), (100.0, 5.0)])
        };
        let lines_in = [
            series(&[(1.0, 1.0), (0.0, 2.0), (100.0, f64::NAN), (50.0, 9.0)]),
            limit,
        ];
        for (log_x, log_y) in [(false, false), (true, false), (false, true), (true, true)] {
            let svg = lines("Title", "bytes", "µs", log_x, log_y, &lines_in).unwrap();
            for text in ["<svg", "Title", "bytes", "µs", "gemessen", "floor"] {
                assert!(svg.contains(text), "{text} is missing");
            }
            // Circles mark measurements: the zero is kept on a linear axis only, the NaN nowhere.
            let expected = if log_x { 2 } else { 3 };
            assert_eq!(svg.matches("<circle").count(), expected);
        }
    }

    #[test]
    fn a_picture_without_a_point_is_refused() {
        assert!(lines("t", "x", "y", true, true, &[series(&[(0.0, 1.0)])]).is_err());
        assert!(lines("t", "x", "y", false, false, &[]).is_err());
    }

    #[test]
    fn numbers_on_an_axis_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.05, "0.05"),
            (3.0, "3"),
            (1500.0, "1500"),
            (16_000_000.0, "16M"),
            (20_000.0, "20k"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
