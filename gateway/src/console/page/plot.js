// A line plot of the last readings, drawn as SVG.

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 120;

export class Plot {
  /// `series`: their names; `format`: a value in words.
  constructor(parent, title, series, format) {
    this.format = format;
    this.title = title;
    this.series = series.map(name => ({ name, values: [] }));
    const figure = document.createElement("figure");
    figure.className = "plot";
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 100`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    for (const line of this.series) {
      line.line = document.createElementNS(SVG, "polyline");
      this.svg.append(line.line);
    }
    const caption = document.createElement("figcaption");
    const name = document.createElement("span");
    name.textContent = title;
    this.now = document.createElement("span");
    caption.append(name, this.now);
    figure.append(caption, this.svg);
    parent.append(figure);
  }

  /// Adds a reading of every series; null: nothing to show.
  push(values) {
    this.series.forEach((line, i) => {
      line.values.push(values[i]);
      if (line.values.length > POINTS) line.values.shift();
    });
    const known = this.series.flatMap(line => line.values).filter(value => value !== null);
    const top = Math.max(...known, 1e-9) * 1.1;
    this.now.replaceChildren();
    const words = [];
    this.series.forEach((line, i) => {
      const from = POINTS - line.values.length;
      line.line.setAttribute("points", line.values
        .map((value, x) => value === null ? "" : `${from + x},${100 - value / top * 100}`).join(" "));
      const last = line.values.findLast(value => value !== null);
      const text = `${line.name} ${last === undefined ? "–" : this.format(last)}`.trim();
      const key = document.createElement("span");
      key.className = `key${i}`;
      key.textContent = ` ${text} `;
      this.now.append(key);
      words.push(text);
    });
    this.svg.setAttribute("aria-label", `${this.title}: ${words.join(", ")}`);
  }
}
