(function () {
  "use strict";
  var data = JSON.parse(document.getElementById("data").textContent);

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }
  function colors(names) {
    return Array.isArray(names) ? names.map(color) : color(names);
  }

  function axis(title, extra) {
    return Object.assign({
      title: {text: title, standoff: 8, font: {size: 12.5}}, automargin: true, gridcolor: color("grid"), linecolor: color("line"),
      zerolinecolor: color("line"), tickfont: {size: 12}, fixedrange: true
    }, extra);
  }

  function trace(panel, series, width) {
    var paint = colors(series.color);
    var number = panel.percent ? ".1%" : ".4~g";
    var made = {name: series.name, x: series.x, y: series.y};
    if (panel.kind === "lines") {
      return Object.assign(made, {
        type: "scatter", mode: series.markers ? "lines+markers" : "lines", connectgaps: false,
        opacity: series.faint ? 0.28 : 1, showlegend: !series.faint, hoverinfo: series.faint ? "skip" : undefined,
        line: {color: paint, width: series.faint ? 1 : 2.4, dash: series.dash}, marker: {color: paint, size: 6},
        hovertemplate: series.faint ? undefined : "%{y:" + number + "}"
      });
    }
    made.type = "bar";
    made.marker = {color: paint};
    if (panel.kind === "bars") {
      made.marker.opacity = series.hatched ? 0.55 : 1;
      made.marker.pattern = series.hatched ? {shape: "/", size: 5, solidity: 0.35} : {};
      made.text = series.y.map(function (value) { return panel.percent ? String(Math.round(100 * value)) : value.toFixed(1); });
      made.textposition = "outside";
      made.textfont = {size: width < 420 ? 8.5 : 11};
      made.textangle = 0;
      made.constraintext = "none";
      made.cliponaxis = false;
      made.hovertemplate = "%{x}: %{y:" + number + "}";
    } else if (panel.kind === "rows") {
      made.orientation = "h";
      made.hovertemplate = "%{x:.1f} s";
    } else {
      made.hovertemplate = "%{y:.3f} s";
    }
    return made;
  }

  function layout(panel) {
    var made = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {family: getComputedStyle(document.body).fontFamily, size: 12.5, color: color("ink")},
      margin: {l: 12, r: 14, t: 10, b: 10, pad: 2}, hovermode: panel.kind === "rows" ? "closest" : "x unified",
      hoverlabel: {bgcolor: color("card"), bordercolor: color("line"), font: {color: color("ink")}},
      legend: {orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", font: {size: 12.5}},
      bargap: panel.kind === "stack" ? 0.06 : 0.28, bargroupgap: 0.06,
      barmode: panel.kind === "bars" ? "group" : "stack",
      xaxis: axis(panel.x_title, panel.kind === "bars" ? {showgrid: false} : {}),
      yaxis: axis(panel.y_title, {rangemode: panel.kind === "lines" ? "normal" : "tozero"})
    };
    var named = panel.series.filter(function (series) { return !series.faint; });
    made.showlegend = panel.kind !== "bars" && named.length > 1;
    if (panel.kind === "rows") {
      made.xaxis.title.text = panel.x_title;
      made.yaxis = axis("", {autorange: "reversed", showgrid: false});
    }
    if (panel.log) {
      var ticks = [];
      for (var power = -6; power <= 6; power += 1) {
        [1, 2, 5].forEach(function (digit) { ticks.push(Number(digit + "e" + power)); });
      }
      Object.assign(made.yaxis, {type: "log", tickvals: ticks, ticktext: ticks.map(String)});
    }
    if (panel.cut !== null) { made.yaxis.range = [0, panel.cut]; }
    if (panel.percent) {
      made.yaxis.tickformat = ".0%";
      made.yaxis.range = panel.kind === "bars" ? [0, 1.14] : [-0.04, 1.04];
      made.yaxis.dtick = 0.25;
    }
    return made;
  }

  function draw() {
    document.querySelectorAll(".plot").forEach(function (place) {
      var panel = data.panels[Number(place.dataset.panel)];
      var traces = panel.series.map(function (series) { return trace(panel, series, place.clientWidth); });
      Plotly.react(place, traces, layout(panel), {displayModeBar: false, responsive: true});
    });
  }

  function element(tag, className, text) {
    var made = document.createElement(tag);
    if (className) { made.className = className; }
    if (text !== undefined) { made.textContent = text; }
    return made;
  }

  // The newlines that carry the decision would be invisible: they are shown as signs.
  function words(text) {
    var made = element("pre");
    var newlines = text.match(/^\n*/)[0].length;
    made.append(element("span", "newline", "↵".repeat(newlines)), (newlines === 1 ? "\n" : "") + text.slice(newlines));
    return made;
  }

  function rolloutCard(rollout) {
    var card = element("article", "rollout");
    var marks = element("div", "marks");
    if (rollout.reward === null) {
      marks.append(element("span", "", "not graded"));
    } else {
      var good = rollout.reward > 0;
      marks.append(element("span", good ? "right" : "wrong", (good ? "✓ " : "✗ ") + "reward " + rollout.reward));
    }
    if (rollout.advantage !== null) {
      marks.append(element("span", "", "advantage " + (rollout.advantage > 0 ? "+" : "") + rollout.advantage.toFixed(2)));
    }
    marks.append(element("span", "", rollout.tokens + " tokens"));
    if (rollout.p !== null) { marks.append(element("span", "", "p(think) " + rollout.p.toFixed(3))); }
    if (rollout.free) { marks.append(element("span", "", "chosen freely")); }
    if (rollout.truncated) { marks.append(element("span", "cut", "truncated")); }
    card.append(marks, words(rollout.text));
    if (rollout.reason) { card.append(element("p", "reason", rollout.reason)); }
    return card;
  }

  function column(mode, title, rollouts) {
    var made = element("div", "column");
    made.style.setProperty("--mode", "var(--" + mode + ")");
    var head = element("h3", "", title);
    var graded = rollouts.filter(function (rollout) { return rollout.reward !== null; });
    if (graded.length) {
      var right = graded.filter(function (rollout) { return rollout.reward > 0; }).length;
      head.append(element("small", "", right + " of " + graded.length + " rewarded"));
    }
    made.append(head);
    rollouts.forEach(function (rollout) { made.append(rolloutCard(rollout)); });
    if (!rollouts.length) { made.append(element("p", "empty", "No rollout in this mode.")); }
    return made;
  }

  function showGroup(group) {
    var place = document.getElementById("group");
    place.replaceChildren();
    var asked = element("div", "question");
    if (group.images.length) {
      var images = element("div", "images");
      group.images.forEach(function (source) {
        var image = element("img");
        image.alt = "image of the question";
        image.addEventListener("load", function () {
          if (image.naturalWidth <= 160) {
            image.className = "small";
            image.width = image.naturalWidth * Math.max(1, Math.floor(260 / image.naturalWidth));
          }
        });
        image.src = source;
        images.append(image);
      });
      asked.append(images);
    }
    var text = element("div", "asked");
    var about = [group.source, group.difficulty, group.id].filter(Boolean).join(" · ");
    text.append(element("p", "meta", about), element("p", "", group.question));
    var answer = element("p", "", "Reference answer: ");
    answer.append(element("b", "", group.answer));
    text.append(answer);
    asked.append(text);
    var columns = element("div", "columns");
    [["thinking", "Thinking"], ["direct", "Direct"], ["auto", "Neither mode"]].forEach(function (pair) {
      var mine = group.rollouts.filter(function (rollout) { return rollout.mode === pair[0]; });
      if (mine.length || pair[0] !== "auto") { columns.append(column(pair[0], pair[1], mine)); }
    });
    place.append(asked, columns);
  }

  function startViewer() {
    var steps = data.steps;
    var pickStep = document.getElementById("pick-step");
    var pickGroup = document.getElementById("pick-group");
    if (!pickStep) { return; }
    function score(group, mode) {
      var mine = group.rollouts.filter(function (rollout) { return rollout.mode === mode; });
      var right = mine.filter(function (rollout) { return rollout.reward > 0; }).length;
      return mine.length ? mode + " " + right + "/" + mine.length : "";
    }
    function fillGroups() {
      pickGroup.replaceChildren();
      steps[pickStep.selectedIndex].groups.forEach(function (group) {
        var parts = ["#" + group.index, group.difficulty || group.source, score(group, "thinking"), score(group, "direct")];
        pickGroup.append(element("option", "", parts.filter(Boolean).join("  ·  ")));
      });
    }
    function show() {
      showGroup(steps[pickStep.selectedIndex].groups[pickGroup.selectedIndex]);
    }
    function move(by) {
      var order = [];
      steps.forEach(function (step, i) { step.groups.forEach(function (group, j) { order.push([i, j]); }); });
      var at = order.findIndex(function (pair) { return pair[0] === pickStep.selectedIndex && pair[1] === pickGroup.selectedIndex; });
      var to = order[(at + by + order.length) % order.length];
      if (to[0] !== pickStep.selectedIndex) { pickStep.selectedIndex = to[0]; fillGroups(); }
      pickGroup.selectedIndex = to[1];
      show();
    }
    steps.forEach(function (step) { pickStep.append(element("option", "", step.label)); });
    pickStep.addEventListener("change", function () { fillGroups(); show(); });
    pickGroup.addEventListener("change", show);
    document.getElementById("previous").addEventListener("click", function () { move(-1); });
    document.getElementById("next").addEventListener("click", function () { move(1); });
    pickStep.selectedIndex = steps.length - 1;
    fillGroups();
    var telling = steps[steps.length - 1].groups.findIndex(function (group) {
      return new Set(group.rollouts.map(function (rollout) { return rollout.reward; })).size > 1;
    });
    pickGroup.selectedIndex = Math.max(0, telling);
    show();
  }

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  startViewer();
  document.documentElement.setAttribute("data-ready", "true");
})();
